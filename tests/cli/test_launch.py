"""The launcher: which failure was the cause, a worker's error file, and real processes that work, crash and hang."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from torch.distributed.elastic.rendezvous import RendezvousParameters

from fp8moe.__main__ import main
from fp8moe.cli import launch, loopback
from fp8moe.cli.command import Failure
from fp8moe.parallel import hang, place
from tests.train.runs import SMALL, write_corpus

ROOT = Path(__file__).resolve().parent.parent.parent


def failure(exitcode: int, sentence: str = "", **extra: Any) -> Any:
    message: Any = "no file"
    if sentence:
        message = {"message": sentence, "extraInfo": {"timestamp": "100", **extra}}
    return SimpleNamespace(exitcode=exitcode, message=message, timestamp=100)


@pytest.mark.parametrize(
    ("failures", "code", "sentence"),
    [
        # The cause comes before secondary failures, also within the same second.
        ({0: failure(1, "lost", time=100.2, secondary=True), 1: failure(5, "nan", time=100.4)}, 5, "rank 1: nan"),
        ({0: failure(1, "late", time=100.9), 1: failure(4, "first", time=100.1)}, 4, "rank 1: first"),
        (
            {0: failure(-15), 1: failure(1, "lost", time=100.0, secondary=True), 2: failure(-9)},
            137,
            "rank 2: ended by SIGKILL",
        ),
        ({0: failure(-15), 1: failure(3, "no corpus", time=100.0, shared=True)}, 3, "no corpus"),
        ({0: failure(-11), 1: failure(-15)}, 139, "rank 0: ended by SIGSEGV"),
        ({0: failure(-9), 1: failure(4, "memory", time=100.1)}, 4, "rank 1: memory"),  # a message explains more
        ({0: failure(7)}, 7, "rank 0: ended with exit code 7 and no message"),
    ],
)
def test_the_cause_of_several_failures(failures: dict[int, Any], code: int, sentence: str, tmp_path: Path) -> None:
    assert launch._cause(failures, tmp_path)[0] == code
    assert launch._cause(failures, tmp_path)[1].startswith(sentence)


def test_the_rank_that_waits_for_a_killed_one(tmp_path: Path) -> None:
    def note(rank: int, last: str, **groups: list[Any]) -> None:
        joined = {f"group {name}": state for name, state in groups.items()}
        text = json.dumps({"last": f"group {last}", "groups": joined})
        (tmp_path / f"rank-{rank}.json").write_text(text.ljust(300))

    dp, ep = [9, "all_reduce", "0-3"], [4, "all_to_all (counts)", "2, 3"]
    note(0, "dp0", dp0=dp)
    note(2, "ep1", dp0=dp, ep1=ep)
    note(3, "ep1", dp0=dp, ep1=ep)
    (tmp_path / "rank-1.json").write_text("")  # it has only started
    killed = {3: failure(-9), 2: failure(-15)}
    last = "its last message was all_to_all (counts), number 4 of group ep1 (ranks 2, 3)"
    assert launch._cause(killed, tmp_path)[1].endswith(f"; {last}")
    note(2, "ep1", dp0=dp, ep1=[5, "all_to_all (dispatch)", "2, 3"])
    waits = "; rank 2 waits for it in all_to_all (dispatch), number 5 of group ep1 (ranks 2, 3)"
    assert launch._cause(killed, tmp_path)[1].endswith(waits)
    assert launch._cause({1: failure(-9)}, tmp_path)[1].endswith("memory runs out")  # it joined nothing


def test_a_worker_writes_its_failure_for_its_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv(launch.LAUNCHED, raising=False)
    launch.report(Failure(5, "nan"))
    assert capsys.readouterr().err == "fp8moe: rank 1: nan\n"
    message = json.loads((tmp_path / "error.json").read_text())["message"]
    assert (message["message"], message["errorCode"]) == ("nan", 5) and int(message["extraInfo"]["timestamp"]) > 0
    launch.report(Failure(2, "bad", shared=True))  # rank 0 prints that
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    launch.report(Failure(2, "bad", shared=True))
    assert capsys.readouterr().err == "fp8moe: bad\n"
    monkeypatch.setenv(launch.LAUNCHED, "1")  # the launcher prints it
    launch.report(Failure(1, "bug", traceback="Traceback"))
    assert capsys.readouterr().err == ""


def test_how_many_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert (launch.count_processes("3"), launch.count_processes("auto")) == (3, 4)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert launch.count_processes("auto") == 8
    for text in ("0", "-1", "two", ""):
        with pytest.raises(ValueError, match="must be a whole number of at least 1, or auto"):
            launch.count_processes(text)


def test_the_launchers_environment_is_its_workers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    before = dict(os.environ)
    with launch._environment(4, "notes"):
        assert os.environ[hang.NOTES] == "notes"
        assert os.environ[launch.LAUNCHED] == "1" and os.environ["OMP_NUM_THREADS"] == "7"
    assert dict(os.environ) == before
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(launch, "usable_cores", lambda: 8)
    for processes, threads in ((4, "2"), (3, "2"), (16, "1")):  # the cores are shared
        with launch._environment(processes, "notes"):
            assert os.environ["OMP_NUM_THREADS"] == threads
        assert "OMP_NUM_THREADS" not in os.environ


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def start(cwd: Path, *words: str) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=cwd, env=environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=100)
    finally:
        process.kill()
    return process.returncode, out, err


def workers_of(process: subprocess.Popen[str], run_dir: Path) -> list[int]:
    """The workers' process ids, once the run has done a step."""
    deadline = time.monotonic() + 60
    while not (run_dir / "metrics.jsonl").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children]


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_two_ranks_make_one_run(corpus: list[str], tmp_path: Path) -> None:
    code, out, err = finish(start(tmp_path, "-m", "fp8moe", "train", "--nproc", "2", *SMALL, *corpus, "steps=3"))
    assert (code, err) == (0, ""), err
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert sorted(path.name for path in (run_dir / "logs").iterdir()) == ["rank-0.log", "rank-1.log"]
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 3
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["world_size"], summary["steps"]) == (2, 3)
    assert out.count("run directory ") == 2 and out.count("step 3/3") == 1
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line)["time"]["exposed_communication"] > 0


def test_a_configuration_error_is_printed_once_with_its_exit_code(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--nproc", "2", *SMALL, *corpus]
    late = start(tmp_path, "-m", "fp8moe", *words, "data.paths=[missing]", "run_dir=late")  # found by a rank
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fp8moe.cli.train.launch", None)  # not reached: no process is started
    assert main([*words, "parallel.ep=3"]) == 2
    captured = capsys.readouterr()
    assert captured == ("", "fp8moe: parallel.ep=3 does not divide num_experts=4: use 1, 2 or 4\n")
    code, _, err = finish(late)
    assert code == 3 and err.startswith("fp8moe: missing.idx does not exist") and err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_crash_ends_all_ranks_and_is_the_last_line(corpus: list[str], tmp_path: Path) -> None:
    words = ["train", "--nproc", "2", *SMALL, *corpus, "steps=100000", "run_dir=crash"]
    process = start(tmp_path, "-m", "fp8moe", *words)
    workers = workers_of(process, tmp_path / "crash")
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    code, _, err = finish(process)
    assert code == 137 and err.splitlines()[-1].startswith("fp8moe: rank 1: ended by SIGKILL")
    assert re.search(r"(dp0|ep0|dense0) \(ranks 0-1\)$", err.splitlines()[-1])
    assert all(is_gone(pid) for pid in workers)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_the_launcher_reaches_the_ranks(corpus: list[str], tmp_path: Path, number: signal.Signals) -> None:
    words = ["train", "--nproc", "2", *SMALL, *corpus, "steps=100000", "run_dir=asked"]
    process = start(tmp_path, "-m", "fp8moe", *words)
    workers = workers_of(process, tmp_path / "asked")
    begin = time.monotonic()
    process.send_signal(number)
    code, _, err = finish(process)
    assert code == 75 and time.monotonic() - begin < 25, err
    assert re.search(rf"stopped by {number.name}: step \d+ is saved", err.splitlines()[-1])
    assert (tmp_path / "asked" / "checkpoints" / "latest").exists() and all(is_gone(pid) for pid in workers)


def test_the_launchers_store_is_reached_by_loopback_alone() -> None:
    store = loopback.LoopbackRendezvous(RendezvousParameters("fp8moe-loopback", "", "id", 1, 1))
    port = store.next_rendezvous().bootstrap_store_info.master_port
    socket.create_connection((loopback.ADDRESS, port), timeout=5).close()
    for address in {"127.0.0.2", *socket.gethostbyname_ex(socket.gethostname())[2]} - {loopback.ADDRESS}:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((address, port), timeout=5)


def test_folders_of_dead_launchers_go_and_those_of_live_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    alive = place.this_process()
    owners = {
        "dead": alive | {"started": "0"},
        "alive": alive,
        "elsewhere": alive | {"host": "another", "started": "0"},
    }
    for name, owner in owners.items():
        (tmp_path / f"{launch.SCRATCH}{name}").mkdir()
        (tmp_path / f"{launch.SCRATCH}{name}" / launch.OWNER).write_text(json.dumps(owner))
    with launch._scratch() as mine:
        left = {path.name.removeprefix(launch.SCRATCH) for path in tmp_path.iterdir()} - {Path(mine).name}
        assert left - {Path(mine).name.removeprefix(launch.SCRATCH)} == {"alive", "elsewhere"}
    assert not Path(mine).exists()


def test_a_frozen_rank_is_named_and_ended(corpus: list[str], tmp_path: Path) -> None:
    """SIGTERM does not reach a stopped process, and both launchers would wait half a minute for it.

    Where it stopped is said but where it had joined the collective that the other one waits for.
    """
    timeout = 5
    words = ["-m", "fp8moe", "train", *SMALL, *corpus, "steps=100000", f"parallel.timeout={timeout}"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ours = start(tmp_path, *words[:3], "--nproc", "2", *words[3:], "run_dir=ours")
    theirs = start(tmp_path, *torchrun, *words, "run_dir=theirs")
    frozen = {process: workers_of(process, tmp_path / name) for process, name in ((ours, "ours"), (theirs, "theirs"))}
    for workers in frozen.values():
        os.kill(workers[1], signal.SIGSTOP)
    begin = time.monotonic()
    named = "rank 1 has ended or is frozen( and stopped after number|:)"
    for process, exit_code in ((ours, 6), (theirs, 1)):
        code, _, err = finish(process)
        assert (code, time.monotonic() - begin < timeout + 20) == (exit_code, True), err
        said = err.splitlines()[-1] if process is ours else err
        assert re.search(named, said) and re.search(r"number \d+ of group (dp0|ep0|dense0) \(ranks 0-1\)", said), err
        assert all(is_gone(pid) for pid in frozen[process])


def test_workers_die_with_their_launcher(corpus: list[str], tmp_path: Path) -> None:
    words = ["-m", "fp8moe", "train", *SMALL, *corpus, "steps=100000", "run_dir=orphans"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = start(tmp_path, *torchrun, *words)
    workers = workers_of(process, tmp_path / "orphans")
    assert len(workers) == 2
    process.kill()
    process.communicate(timeout=30)
    deadline = time.monotonic() + 10
    while not all(is_gone(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_torchrun_shows_the_sentence(tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    code, out, err = finish(start(tmp_path, *torchrun, "-m", "fp8moe", "train", "steps=many"))
    sentence = "steps='many' (str) must be a whole number"
    assert (code, out) == (1, "") and sentence in err and err.count(f"fp8moe: {sentence}") <= 1


def test_the_configuration_is_printed_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--cfg", "job"], ["--nproc", "4", "steps=7", "--cfg", "job"]):
        assert main(["train", *words]) == 0
        assert capsys.readouterr().out.count("\nsteps: ") == 1
    for rank, times in (("0", 1), ("1", 0)):
        for name, value in (("RANK", rank), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
            monkeypatch.setenv(name, value)
        assert main(["train", "--cfg", "job"]) == 0
        assert capsys.readouterr().out.count("\nsteps: ") == times


def test_the_printed_configuration_has_what_the_processes_fill_in(capsys: pytest.CaptureFixture[str]) -> None:
    """dp, ep and the micro-batch; where the processes can't run it, it is printed as typed, under the reason."""

    def printed(*words: str) -> tuple[str, tuple[object, ...]]:
        assert main(["train", *words, "--cfg", "job"]) == 0
        text = capsys.readouterr().out
        tree = yaml.safe_load(text)
        return text, (tree["parallel"]["dp"], tree["parallel"]["ep"], tree["batch"]["micro_batch"])

    assert printed("experiment=quickstart")[1] == (1, 1, 16)
    assert printed("--nproc", "4", "experiment=quickstart")[1] == (4, 4, 4)
    assert printed("--nproc", "4", "experiment=quickstart", "parallel.pp=2")[1] == (2, 2, 8)
    text, filled = printed("experiment=quickstart", "parallel.ep=4")
    assert filled == (None, 4, None) and text.startswith("# as typed, since 1 process can't run it: ")
    assert text.splitlines()[1] == "model:"
