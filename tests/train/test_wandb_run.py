"""wandb beside a run: what it is sent, what stays of its id, and servers that refuse, hang, answer errors, or end.

A package with the real one's signatures takes its place; the last tests use the real one where it is installed.
"""

from __future__ import annotations

import http.server
import json
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fp8moe.train import wandb_process, wandb_run
from fp8moe.train.metrics import MetricsWriter
from fp8moe.train.trackers import LoggingConfig, is_installed
from tests.train.test_metrics import REPORT

ROOT = Path(__file__).resolve().parent.parent.parent
HAS_WANDB = is_installed("wandb")
FAKE = """
import json, os, time

def note(*call):
    with open(os.environ["FAKE_CALLS"], "a") as file:
        file.write(json.dumps(call) + "\\n")
    fault = os.environ.get("FAKE_FAULT", "")
    if fault == f"{call[0]} hangs":
        time.sleep(600)
    if fault == f"{call[0]} raises":
        raise RuntimeError("the server said:\\n500")
    if fault == f"{call[0]} exits":
        raise SystemExit(1)
    if fault == f"{call[0]} dies":
        os._exit(7)

class Settings:
    def __init__(self, *, init_timeout=90.0, console="auto", silent=False, disable_git=False, disable_code=False):
        self.kept = dict(init_timeout=init_timeout, console=console)

class Run:
    def __init__(self):
        self.summary = {}
    def log(self, data, step=None, commit=None):
        note("log", data, step)
    def finish(self, exit_code=None, quiet=None):
        note("finish", exit_code, self.summary)

def init(entity=None, project=None, dir=None, id=None, name=None, config=None, mode=None, resume=None, settings=None):
    asked = dict(project=project, dir=dir, id=id, name=name, config=config, mode=mode, resume=resume)
    note("init", asked, settings.kept)
    return Run()
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    package = tmp_path / "packages" / "wandb"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package.parent), str(ROOT)]))
    monkeypatch.setenv("FAKE_CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.syspath_prepend(str(package.parent))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(wandb_run, "FINISH_SECONDS", 1.0)
    (tmp_path / "run" / "logs").mkdir(parents=True)
    return tmp_path / "calls"


def said(calls: Path) -> list[Any]:
    return [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []


def until_said(calls: Path, name: str) -> None:
    deadline = time.monotonic() + 20
    while name not in [call[0] for call in said(calls)]:
        assert time.monotonic() < deadline, said(calls)
        time.sleep(0.02)


def writer(run: Path, warned: list[str], after: int = 0) -> MetricsWriter:
    return MetricsWriter(run, LoggingConfig(wandb=True, wandb_project="p"), "n", {"seed": 1}, after, warned.append)


def wandb_of(one: MetricsWriter) -> wandb_run.WandbRun:
    found = one._trackers._trackers["wandb"]
    assert isinstance(found, wandb_run.WandbRun)
    return found


def test_what_wandb_gets_and_that_a_resume_goes_on_in_its_run(calls: Path, tmp_path: Path) -> None:
    warned: list[str] = []
    one = writer(tmp_path / "run", warned)
    one.write(REPORT, {"val_loss": 3.0})
    one.close({"steps": 1})
    (_, asked, settings), (_, record, step), finish = said(calls)
    assert finish == ["finish", 0, {"steps": 1}] and warned == []
    assert step == 1 and record["time/forward"] == 0.5 and record["val_loss"] == 3.0 and "time" not in record
    assert asked["mode"] == "offline" and asked["resume"] == "allow" and asked["config"] == {"seed": 1}
    assert (asked["project"], asked["name"], asked["dir"]) == ("p", "n", str(tmp_path / "run"))
    assert settings == {"init_timeout": wandb_process.INIT_SECONDS, "console": "off"}
    calls.unlink()
    two = writer(tmp_path / "run", warned, after=1)
    two.write(replace(REPORT, step=2), {})
    two.close()  # without a summary it failed
    assert said(calls)[0][1]["id"] == asked["id"] == (tmp_path / "run" / "wandb-id").read_text().strip()
    assert said(calls)[-1] == ["finish", 1, {}] and warned == []
    (tmp_path / "other" / "logs").mkdir(parents=True)
    assert wandb_run.run_id(tmp_path / "other") != asked["id"]


def test_wandb_is_online_with_a_key_and_not_started_unless_asked_for(
    calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    MetricsWriter(tmp_path / "run", LoggingConfig(), "n", {}, after_step=0).close()
    assert said(calls) == [] and not (tmp_path / "run" / "wandb-id").exists()
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    writer(tmp_path / "run", []).close({})
    assert said(calls)[0][1]["mode"] == "online" and "kkkk" not in calls.read_text()


@pytest.mark.parametrize("fault", ["init raises", "init exits", "log raises", "log dies"])
def test_a_failure_is_one_warning_and_the_run_goes_on(
    fault: str, calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAULT", fault)
    warned: list[str] = []
    one = writer(tmp_path / "run", warned)
    one.write(REPORT, {})
    until_said(calls, fault.split()[0])
    for step in range(2, 200):  # it is noticed at some step
        one.write(replace(REPORT, step=step), {})
        time.sleep(0.0 if warned else 0.01)
    assert len(warned) == 1 and warned[0].endswith("the run goes on, metrics.jsonl has every step"), warned
    why = {"raises": "the server said: 500", "exits": "1", "dies": "its process has ended"}[fault.split()[1]]
    assert f"wandb logs no more ({why})" in warned[0]
    one.close({"steps": 199})
    assert len(warned) == 1 and len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 199


@pytest.mark.parametrize("fault", ["init hangs", "finish hangs"])
def test_what_never_answers_delays_no_step_and_the_end_by_seconds(
    fault: str, calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAULT", fault)
    warned: list[str] = []
    begin = time.monotonic()
    one = writer(tmp_path / "run", warned)
    for step in range(1, 300):
        one.write(replace(REPORT, step=step), {})
    assert time.monotonic() - begin < 2.0 and warned == []
    until_said(calls, "init")
    process = wandb_of(one)
    begin = time.monotonic()
    one.close({})
    assert 0.9 < time.monotonic() - begin < 5.0
    assert len(warned) == 1 and "needs over 1 s at the end" in warned[0]
    assert process._process.poll() is not None


def test_a_frozen_process_blocks_no_step(calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_run, "MOST_PENDING", 100_000)
    warned: list[str] = []
    one = writer(tmp_path / "run", warned)
    until_said(calls, "init")
    os.kill(wandb_of(one)._process.pid, signal.SIGSTOP)
    begin = time.monotonic()
    for step in range(1, 600):  # the pipe holds some hundred of them
        one.write(replace(REPORT, step=step), {})
    assert time.monotonic() - begin < 2.0
    assert warned == [
        "wandb logs no more (its process left 100000 bytes unread): the run goes on, metrics.jsonl has every step"
    ]
    monkeypatch.setattr(wandb_run, "CLOSE_SECONDS", 1.0)
    one.close({})


def test_its_process_ends_when_the_run_is_killed(calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAULT", "finish hangs")
    one = writer(tmp_path / "run", [])
    one.write(REPORT, {})
    until_said(calls, "log")
    process = wandb_of(one)._process
    assert process.stdin is not None
    process.stdin.close()  # as a death of rank 0 does
    process.wait(5.0)
    assert said(calls)[-1] == ["finish", 1, {}]


def test_a_folder_of_earlier_runs_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    assert not is_installed("wandb")


class Answers500(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.send_error(500)

    do_GET = do_POST

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def ports() -> Iterator[dict[str, int]]:
    """A port where nothing answers a connection, one that refuses, one whose HTTP server knows errors only."""
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.create_server(("127.0.0.1", 0)) as gone:
        refused = gone.getsockname()[1]
        gone.close()
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers500)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield {"hangs": silent.getsockname()[1], "refuses": refused, "answers 500": server.server_port}
        server.shutdown()
        server.server_close()


@pytest.mark.skipif(not HAS_WANDB, reason='wandb is not installed: pip install "fp8moe[wandb]" runs this')
@pytest.mark.parametrize("server", ["hangs", "refuses", "answers 500"])
def test_the_real_package_with_a_server_that(
    server: str, ports: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{ports[server]}")
    monkeypatch.setattr(wandb_run, "FINISH_SECONDS", 2.0)
    (tmp_path / "logs").mkdir()
    warned: list[str] = []
    begin = time.monotonic()
    one = writer(tmp_path, warned)
    one.write(REPORT, {})
    one.close({})
    assert time.monotonic() - begin < 6.0 and len(warned) == 1
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert all(b"k" * 40 not in path.read_bytes() for path in files)


@pytest.mark.skipif(not HAS_WANDB, reason='wandb is not installed: pip install "fp8moe[wandb]" runs this')
def test_the_real_package_writes_a_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "logs").mkdir()
    warned: list[str] = []
    for step in (1, 2):  # twice: a run and its resume
        one = writer(tmp_path, warned, after=step - 1)
        one.write(replace(REPORT, step=step, loss=float(step)), {})
        one.close({"steps": step})
    assert warned == []
    assert {step: record["loss"] for step, record in history(tmp_path).items()} == {1: 1.0, 2: 2.0}
    ids = {record.run.run_id for record in records(tmp_path) if record.HasField("run")}
    assert ids == {wandb_run.run_id(tmp_path)}


def records(run_dir: Path) -> Iterator[Any]:
    """wandb's own records in the offline directories of a run."""
    from wandb.proto.wandb_internal_pb2 import Record

    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        for data in log_records(path.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            yield record


def history(run_dir: Path) -> dict[int, dict[str, Any]]:
    """What wandb has of each step."""
    found = {}
    for record in records(run_dir):
        if record.HasField("history"):
            items = {one.key or one.nested_key[0]: json.loads(one.value_json) for one in record.history.item}
            found[items["_step"]] = items
    return found


def log_records(data: bytes) -> Iterator[bytes]:
    """Records of a `.wandb` file: 7 bytes, then LevelDB's log, pieces (checksum, length, kind) in 32 KB blocks."""
    at, record = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        _, length, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or a record's last piece
            yield record
            record = b""
