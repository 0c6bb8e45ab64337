"""Verifiers of users: whatever a call does, its sample alone is excluded, and no process is left."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fp8moe.errors import ConfigError
from fp8moe.post.verify.registry import verifier
from fp8moe.post.verify.verdict import Verdict

OWN = """
import ctypes, os, sys, time
from pathlib import Path
from fp8moe.post.verify.verdict import Verdict
def check(text, row, folder):
    if "torch" in sys.modules: return Verdict(False, "it has torch")
    (Path(folder) / str(os.getpid())).touch()
    if text == "hang": time.sleep(60)
    if text == "crash": ctypes.string_at(0)
    if text == "exit": sys.exit("over")
    if text == "end": os._exit(3)
    if text == "wait": time.sleep(0.3)
    return Verdict(text == row["answer"], "é\\ud800", text == "unsure")
"""


def is_alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_a_call_does_is_the_verdict_on_its_sample_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_of_a_test.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    kept = tmp_path / "kept"
    kept.mkdir()
    name = f"own_of_a_test:check:folder={kept}"
    verify = verifier(name, timeout=1.0)
    rejected = Verdict(False, "é\ud800")
    expected = {
        "4": Verdict(True, "é\ud800"),
        "5": rejected,
        "hang": Verdict(False, "took longer than --verify-timeout=1 s", raised=True),
        "crash": Verdict(False, "ended its process by SIGSEGV", raised=True),
        "exit": Verdict(False, "raised SystemExit: over", raised=True),
        "end": Verdict(False, "ended its process with exit code 3", raised=True),
        "unsure": Verdict(False, "é\ud800", raised=True),
    }
    for text, verdict in expected.items():
        assert verify(text, {"answer": "4"}) == verdict and verify("", {"answer": "4"}) == rejected
    assert verify("4", {}) == Verdict(False, "raised KeyError: 'answer'", raised=True)
    for one in kept.iterdir():
        one.unlink()
    with ThreadPoolExecutor(4) as pool:
        began = time.monotonic()
        found = list(pool.map(lambda _: verify("wait", {"answer": "wait"}).ok, range(8)))
        took = time.monotonic() - began
    pids = [path.name for path in kept.iterdir()]
    assert found == [True] * 8 and len(pids) == 4 and str(os.getpid()) not in pids and took < 8
    deadline = time.monotonic() + 20
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, "they end with their threads"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_module:check", "--verify no_such_module:check can't be imported (ModuleNotFoundError: No module"),
        ("json:no_such", "--verify json:no_such can't be imported (AttributeError: module 'json' has no attribute"),
        ("json:__name__", "--verify json:__name__ is no function: name one that takes a text and a row"),
    ],
)
def test_what_can_not_be_imported_is_one_sentence(name: str, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        verifier(name)
    assert str(raised.value).startswith(said) and "\n" not in str(raised.value)
