"""Rewards of users in a process of their own: the same numbers, and nothing that a function does ends the run."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fp8moe.errors import ConfigError
from fp8moe.post import function_process
from fp8moe.post.function_process import FunctionProcess
from fp8moe.post.function_worker import reward_arguments
from fp8moe.post.tasks import Problem
from tests.post.given_rewards import letters

HERE = "tests.post.given_rewards"
NONE_STARTED = f"{HERE}:does need a process and none can be started (No such file or directory): free memory"
SUM = Problem("What is 4 + 5?", "4+5=9\nAnswer: 9", "9", "line 3 of sums.jsonl")


@contextlib.contextmanager
def started(*names: str, timeout: float | None = 20.0) -> Iterator[FunctionProcess]:
    process = FunctionProcess("reward", [f"{HERE}:{name}" for name in names], timeout)
    try:
        yield process
    finally:
        process.close()


def of(process: FunctionProcess, *texts: str) -> list[list[float | str]]:
    process.begin([reward_arguments(SUM, text) for text in texts])
    deadline = time.monotonic() + 60
    while not process.run(0.05):
        assert time.monotonic() < deadline
    return process.found


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_for(is_so: object, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_numbers_are_those_of_a_call_in_place() -> None:
    generator = random.Random(0)
    texts = [
        "".join(generator.choices("abc ABC é\u2028\n\ud800", k=generator.choice((0, 1, 50, 30000)))) for _ in range(300)
    ]
    with started("letters", "does") as process:
        assert of(process, *texts) == [[letters(SUM, text), len(text)] for text in texts]
        assert of(process) == [] and of(process, "number 1/3") == [[6 / 10, 1 / 3]]
        assert of(process, "torch", "stdin") == [[1.0, 0.0], [1.0, 0.0]], "it has no torch and reads nothing"


def test_what_a_function_does_is_said_and_the_samples_around_it_are_scored(tmp_path: Path) -> None:
    wrong = {
        "exit": "raised SystemExit: over",
        "end": "ended its process with exit code 7",
        "crash": "ended its process by SIGSEGV",
        "interrupt": "raised KeyboardInterrupt: ",
        "lines": "raised ValueError: one two",
        "wordless": "raised WordlessError: an error without words",
        "function": "raised TypeError: float() argument must be a string or a real number, not 'function'",
        "none": "raised TypeError: float() argument must be a string or a real number, not 'NoneType'",
        "infinite": "gave inf",
    }
    texts = [text for word in wrong for text in (word, "ab")]
    with started("does", "letters") as process:
        found = of(process, *texts)
        assert found[::2] == [[words] for words in wrong.values()], "the function behind it is not called"
        assert found[1::2] == [[2.0, 1.0]] * len(wrong)
        os.kill(process._process.pid, signal.SIGTERM)  # as a scheduler does to all processes of a run
        assert of(process, "abc", "end") == [[3.0, 1.0], ["ended its process with exit code 7"]]
        assert of(process, "a") == [[1.0, 1.0]], "behind a batch whose last sample ended it"


def test_a_call_that_takes_too_long_ends_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept, much = tmp_path / "kept", "b" * 1_000_000  # more than a socket holds
    texts = ["a", "sleep 60", "b", "regex", *[much] * 3, "loop", f"leave {kept}", "c", "sleep 0.2", "sleep 0.2"]
    with started("does", timeout=1.0) as process:
        began = time.monotonic()
        found = of(process, *texts)
        took = time.monotonic() - began
        late = ["took longer than grpo.reward_timeout=1 s"]
        expected = [[1.0], late, [1.0], late, *[[1e6]] * 3, late, late, [1.0], [9.0], [9.0]]
        assert found == expected and took < 30
        said = [record.message for record in caplog.records]
        assert said == [
            f"the reward {HERE}:does took longer than grpo.reward_timeout=1 s: its process is ended and started anew"
        ]
        worker, child = map(int, kept.read_text().split())
        wait_for(lambda: not is_alive(worker) and not is_alive(child))


def test_one_that_ends_is_blamed_for_the_sample_in_work_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [text for n in range(4) for text in ("a", "b" * 150_000, *["c"] * (30 + n), "end", "d" * 150_000)]
    with started("does") as process:
        died = "ended its process with exit code 7"
        assert of(process, *texts) == [[died] if text == "end" else [float(len(text))] for text in texts]
        os.kill(process._process.pid, signal.SIGKILL)  # with nothing in work, as the kernel does where memory is short
        process._process.wait()
        assert of(process, "abc", "end") == [[3.0], [died]]
        monkeypatch.setattr(sys, "executable", "/no/such/python")
        assert of(process, "end", "a") == [[died], ["can't be called: grpo.rewards=" + NONE_STARTED]]
        monkeypatch.undo()
        assert of(process, "a") == [[1.0]]


def test_answers_that_came_before_an_end_count_though_sending_fails_first(monkeypatch: pytest.MonkeyPatch) -> None:
    with started("does") as process:
        process.begin([reward_arguments(SUM, text) for text in ("a", "b", "end", "c")])
        process.run(0)
        wait_for(lambda: not is_alive(process._process.pid))
        process._unsent, select = b"more\n", process._selector.select

        def sending(seconds: float) -> object:
            monkeypatch.setattr(process._selector, "select", select)
            return [(process._selector.get_key(process._socket), selectors.EVENT_WRITE)]

        monkeypatch.setattr(process._selector, "select", sending)
        while not process.run(0.1):
            pass
        assert process.found == [[1.0], [1.0], ["ended its process with exit code 7"], [1.0]]


def test_without_a_bound_a_call_may_take_its_time() -> None:
    with started("does", timeout=None) as process:
        assert of(process, "sleep 0.5", "a") == [[9.0], [1.0]]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("tests.post.given_rewards:nothing", "tests.post.given_rewards:nothing can't be imported (AttributeError: "),
        ("no.such:one", "no.such:one can't be imported (ModuleNotFoundError: No module named 'no'): name it mod"),
        (":f", "grpo.rewards=:f can't be imported (ValueError: "),
        ("tests.post.given_rewards:not_a_function", "is no function: name one that takes a problem and a text"),
        ("leaves_at_import:f", "leaves_at_import:f can't be imported (SystemExit: 3): name it module:function"),
        ("dies_at_import:f", "grpo.rewards=dies_at_import:f end their process with exit code 5 when imported: name"),
        ("hangs_at_import:f", "grpo.rewards=hangs_at_import:f are not imported after 1 s: name functions"),
    ],
)  # fmt: skip
def test_what_can_not_be_imported(name: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, line in (("leaves", "sys.exit(3)"), ("dies", "os._exit(5)"), ("hangs", "time.sleep(60)")):
        (tmp_path / f"{module}_at_import.py").write_text(f"import os, sys, time\n{line}\n")
    monkeypatch.syspath_prepend(tmp_path)
    if name.startswith("hangs"):
        monkeypatch.setattr(function_process, "STARTS", 1.0)
    with pytest.raises(ConfigError) as raised:
        FunctionProcess("reward", [name], 1.0)
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_a_module_of_the_working_directory_that_breaks_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "my_own_rewards.py"
    module.write_text("import os\ndef f(problem, text):\n    return 1 if text else os._exit(1)\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path.cwd())])
    monkeypatch.chdir(tmp_path)
    process = FunctionProcess("reward", ["my_own_rewards:f"], 5.0)
    module.write_text("1 / 0\n")
    words = (
        "can't be called: grpo.rewards=my_own_rewards:f can't be imported (ZeroDivisionError: division by zero): "
        "name it module:function"
    )
    assert of(process, "a", "", "a", "a") == [[1.0], ["ended its process with exit code 1"], [words], [words]]
    module.write_text("def f(problem, text):\n    return len(problem.place)\n")
    assert of(process, "a") == [[20.0]], "the next batch tries again"
    process.close()


def test_it_ends_with_what_holds_it() -> None:
    with started("letters") as process:
        worker = process._process.pid
        process.begin([reward_arguments(SUM, "a")] * 5)
        began = time.monotonic()
        process.close()
        assert not is_alive(worker) and time.monotonic() - began < 2
    process = FunctionProcess("reward", [f"{HERE}:does"], 5.0)
    worker = process._process.pid
    process.begin([reward_arguments(SUM, "loop")])
    process.run(0.1)
    del process
    gc.collect()
    assert not is_alive(worker)


def test_it_ends_when_the_socket_closes(tmp_path: Path) -> None:
    """By its own thread, without the kernel's help."""
    kept = tmp_path / "kept"
    with started("does") as process:
        process.begin([reward_arguments(SUM, f"leave {kept}")])
        process.run(0.1)
        wait_for(lambda: kept.exists() and len(kept.read_text().split()) == 2)
        process._selector.unregister(process._socket)
        process._socket.close()
        worker, child = map(int, kept.read_text().split())
        wait_for(lambda: not is_alive(worker) and not is_alive(child))


@pytest.mark.parametrize("text", ["a", "loop", "regex"])
def test_none_is_left_when_the_rank_is_killed(text: str) -> None:
    script = (
        "import sys; from fp8moe.post.function_process import FunctionProcess; "
        f"process = FunctionProcess('reward', ['{HERE}:does'], 100.0); process.begin([[''] * 4 + sys.argv[1:2]]); "
        "process.run(0.3); print(process._process.pid, flush=True); process.run(100); sys.stdin.read()"
    )
    rank = subprocess.Popen([sys.executable, "-c", script, text], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert rank.stdout is not None
    with rank:
        worker = int(rank.stdout.readline())
        try:
            assert is_alive(worker)
            rank.kill()
            wait_for(lambda: not is_alive(worker))
        finally:
            rank.kill()
            if is_alive(worker):
                os.killpg(worker, signal.SIGKILL)
