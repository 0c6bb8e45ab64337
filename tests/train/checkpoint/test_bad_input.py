"""What can be wrong with a run's checkpoints, by the command line: one sentence, its exit code, nothing overwritten."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fp8moe.__main__ import main
from fp8moe.train.checkpoint.hashed_file import HashedFile, WrittenFile
from fp8moe.train.metrics import StepReport
from fp8moe.train.run import Run
from fp8moe.train.step import train_step
from tests.train.runs import SMALL, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def whole(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    settings = [*SMALL, *corpus, "precision=bf16", "steps=2", "checkpoint.every=1", "checkpoint.keep=9"]
    assert main(["train", *settings, f"run_dir={folder}"]) == 0
    return folder


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file but the logs and the list of starts."""
    kept = (path for path in folder.rglob("*") if path.is_file() and path.name != "starts.jsonl")
    files = (path for path in kept if path.parent.name != "logs")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code and the one sentence of a command that fails."""
    capsys.readouterr()
    code = main(["train", *arguments])
    (last,) = capsys.readouterr().err.splitlines()
    assert last.startswith("fp8moe: ") and "Traceback" not in last
    return code, last.removeprefix("fp8moe: ")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def newer(checkpoint: Path) -> None:
    content = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps(content | {"format": 6}))


Fault = Callable[[Path], object]
FAULTS: dict[str, tuple[Fault, str]] = {  # what is done to a checkpoint; how it is named
    "flipped byte": (lambda path: flip(path / "rank-0.safetensors"), "rank-0.safetensors has other bytes than were wr"),
    "truncated": (
        lambda path: (path / "rank-0.safetensors").write_bytes((path / "rank-0.safetensors").read_bytes()[:-7]),
        "rank-0.safetensors has ",
    ),
    "missing": (lambda path: (path / "rank-0.safetensors").unlink(), "rank-0.safetensors is missing"),
    "no index": (lambda path: (path / "index.json").unlink(), "index.json is missing"),
    "another step's file": (
        lambda path: shutil.copy(path.parent / "step-1" / "rank-0.safetensors", path),
        "rank-0.safetensors has other bytes than were written",
    ),
    "another step's manifest": (
        lambda path: shutil.copy(path.parent / "step-1" / "manifest.json", path),
        "rank-0.safetensors has other bytes than were written",
    ),
    "damaged manifest": (lambda path: (path / "manifest.json").write_text("{"), "manifest.json can't be read"),
    "a pickle in its place": (
        lambda path: (path / "rank-0.safetensors").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR."),
        "rank-0.safetensors has 25 bytes and was written with",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_newest_is_damaged(run: Path, fault: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """It is named and the run goes on from the one before; where that is damaged too, nothing is left: exit code 3."""
    chosen = []
    monkeypatch.setattr("fp8moe.train.loop.run_to_end", lambda run, *_: chosen.append(run.step))
    damage, named = FAULTS[fault]
    damage(run / "checkpoints" / "step-2")
    assert main(["train", f"resume={run}", "steps=3"]) == 0
    told = capsys.readouterr().err
    assert chosen == [1] and f"step-2: {named}" in told
    assert told.endswith(f"checkpoint {run / 'checkpoints' / 'step-1'} is whole and taken in its place\n")
    assert told.count(named) == told.count("it is damaged and passed over") == 1, told
    flip(run / "checkpoints" / "step-1" / "index.json")
    before = bytes_of(run)
    code, sentence = refused([f"resume={run}", "steps=4"], capsys)
    assert code == 3 and sentence.startswith(f"none of the 2 checkpoints that resume={run} may use is whole (")
    assert sentence.endswith("use resume=none and another run_dir to start anew")
    assert bytes_of(run) == before


def test_a_checkpoint_that_is_not_meant(run: Path, corpus: list[str], tmp_path: Path, capsys) -> None:
    other = tmp_path / "other.json"
    tokenizer = Path(next(word for word in corpus if "paths" in word)[12:-1] + ".tokenizer.json")
    other.write_text(json.dumps(json.loads(tokenizer.read_text()), indent=7))
    no_manifest, later = tmp_path / "no_manifest", tmp_path / "later"
    shutil.copytree(run / "checkpoints" / "step-2", no_manifest)
    shutil.copytree(run / "checkpoints" / "step-2", later)
    (no_manifest / "manifest.json").unlink()
    newer(later)
    before = bytes_of(tmp_path)
    for words, says in (
        ([f"resume={run}", "model.dim=96"], "step-2 is a checkpoint of another model: model.dim=64 there and 96 here"),
        ([f"resume={run}", f"data.tokenizer={other}"], "was trained with another tokenizer than this run's: use data."),
        ([f"resume={later}"], "checkpoint format 6 is of a later version, which this one cannot"),
        ([f"resume={no_manifest}"], "no_manifest holds no complete checkpoint: name a run directory or its checkpoin"),
        ([f"resume={tmp_path / 'nowhere'}"], "nowhere does not exist: name a run directory or its checkpoints/step-N"),
        ([f"resume={run.parent}"], f"{run.parent} holds no complete checkpoint: name a run in it, such as {run}"),
        (["resume="], "the path of a run or checkpoint is empty: name a run directory or its checkpoints/step-N"),
        ([f"resume={run}", "steps=2"], "step-2 has 2 steps done and steps=2: use steps=3 or more to go on"),
    ):
        code, sentence = refused(["steps=3", *words], capsys)
        assert code == 2 and says in sentence, sentence
        assert bytes_of(tmp_path) == before, says


def test_where_nothing_can_be_written(corpus: list[str], tmp_path: Path, capsys) -> None:
    """Root may write everywhere but below a file and in /proc."""
    (tmp_path / "file").write_text("here before")
    start = [*SMALL, *corpus, "steps=1"]
    for words in ([f"checkpoint.path={tmp_path / 'file'}"], [f"checkpoint.path={tmp_path}/file/x"]):
        code, sentence = refused([*start, f"run_dir={tmp_path / 'run'}", *words], capsys)
        assert code == 2 and sentence.startswith(f"no file can be written to {words[0][16:]} ("), sentence
        assert sentence.endswith("): use another run_dir or checkpoint.path")
    code, sentence = refused([*start, "run_dir=/proc/fp8moe"], capsys)
    assert code == 2 and sentence.startswith("run_dir=/proc/fp8moe cannot be made (")
    assert bytes_of(tmp_path) == {"file": b"here before"}


def test_a_disk_without_room(run: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Exit code 7, at start and while a checkpoint is written. What was there stays, and nothing else."""
    before = bytes_of(run / "checkpoints")
    usage = shutil.disk_usage(run)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**5))
        code, sentence = refused([f"resume={run}", "steps=3"], capsys)
    assert code == 7 and "has 0.0001 GB free and a checkpoint needs 0.0" in sentence  # two numbers that differ

    written, write = [0], HashedFile.write

    def until_full(self: HashedFile, data: bytes | memoryview) -> None:
        written[0] += len(data)
        if written[0] > 50_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, data)

    monkeypatch.setattr(HashedFile, "write", until_full)
    code, sentence = refused([f"resume={run}", "steps=3"], capsys)
    assert code == 7 and sentence.startswith(f"checkpoint {run / 'checkpoints' / 'step-3'} can't be written (rank 0: ")
    assert (
        "(rank 0: No space left on device; rank-0.safetensors needs 0.00" in sentence and " GB are free): " in sentence
    )
    assert sentence.endswith("the checkpoints before it are as they were")
    assert bytes_of(run / "checkpoints") == before and not (run / "checkpoints" / "step-3.tmp").exists()


def test_training_goes_on_without_a_checkpoint(run: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """on_failure=continue: those of steps 3 and 4 fail and are said, that of step 5 is there; the last must be."""
    close = HashedFile.close
    full = [False]

    def until_freed(self: HashedFile) -> WrittenFile:
        if full[0]:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        return close(self)

    def step(run_: Run, **words: object) -> StepReport:
        run_.saver.wait()
        full[0] = run_.step < 4 or run_.step == 6  # of the steps done
        return train_step(run_, **words)  # type: ignore[arg-type]

    monkeypatch.setattr(HashedFile, "close", until_freed)
    monkeypatch.setattr("fp8moe.train.loop.train_step", step)
    words = [f"resume={run}", "checkpoint.on_failure=continue", "checkpoint.keep=9"]
    before = bytes_of(run / "checkpoints")
    before.pop("latest")
    assert main(["train", *words, "steps=5"]) == 0
    told = capsys.readouterr().out
    for number in (3, 4):
        place = run / "checkpoints" / f"step-{number}"
        assert f"checkpoint {place} can't be written (rank 0: Disk quota exceeded; " in told
        assert not place.exists() and not place.with_name(f"{place.name}.tmp").exists()
    assert told.count("training goes on without it (checkpoint.on_failure=continue)") == 2
    left = bytes_of(run / "checkpoints")
    assert left.items() >= before.items() and left["latest"] == b"step-5\n"
    code, sentence = refused([*words, "steps=7"], capsys)
    assert code == 7 and "step-7 can't be written (rank 0: Disk quota exceeded" in sentence
    assert (run / "checkpoints" / "latest").read_text() == "step-6\n" and not (run / "summary.json.tmp").exists()
