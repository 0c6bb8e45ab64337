"""The parsers' errors and every other exception: one sentence and an exit code."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from fp8moe.__main__ import COMMANDS, main
from fp8moe.cli import numerics, schedule, train, warmup
from fp8moe.cli.command import explain, parse
from fp8moe.errors import ConfigError, DataError, HangError, NonFiniteError, ReplicaError

TIMED_OUT = RuntimeError(
    "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:129] Timed out waiting 6000ms for send operation "
    "to complete"
)
LOST = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("a"), 2),
        (ValueError("a"), 2),
        (DataError("a"), 3),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), 4),
        (MemoryError(), 4),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"), 4),
        (NonFiniteError("a"), 5),
        (HangError("a"), 6),
        (TIMED_OUT, 6),
        (RuntimeError("NCCL watchdog: operation ran for 600 s before Timeout"), 6),
        (RuntimeError("wait timeout after 1800000ms, keys: /default_pg/0 of the store"), 6),
        (KeyError("a"), 1),
        (RuntimeError("a"), 1),
        (RuntimeError("a worker of the data loader timed out"), 1),  # no collective
        (ValueError("NCCL timed out"), 2),  # a mistake, whatever it quotes
    ],
)
def test_exit_codes(error: Exception, code: int) -> None:
    failure = explain(error)
    assert failure.code == code and not failure.secondary
    assert bool(failure.traceback) == (code == 1)  # only a defect shows one
    assert failure.sentence and "\n" not in failure.sentence


def test_a_lost_peer_is_a_secondary_failure() -> None:
    failure = explain(LOST)
    assert failure.secondary and failure.code == 1 and "another process ended" in failure.sentence
    assert not failure.traceback and not failure.shared
    unrelated = explain(RuntimeError("Broken pipe of a tokenizer"))
    assert not unrelated.secondary and unrelated.traceback
    assert explain(HangError("a", secondary=True)).secondary and not explain(HangError("a")).secondary


def test_configuration_and_data_errors_are_shared_by_all_ranks() -> None:
    assert explain(ConfigError("a")).shared and explain(DataError("a")).shared and explain(ValueError("a")).shared
    assert explain(NonFiniteError("a")).shared and explain(ReplicaError("a")).shared  # found in sums over all ranks
    for error in (TIMED_OUT, MemoryError(), HangError("a"), KeyError("a")):
        assert not explain(error).shared


def test_a_defect_shows_its_traceback_and_type() -> None:
    try:
        raise KeyError("lost")
    except KeyError as error:
        failure = explain(error)
    assert failure.sentence == "KeyError: 'lost'"
    assert failure.traceback.startswith("Traceback") and "test_command.py" in failure.traceback
    assert explain(ValueError()).sentence == "ValueError"


def test_several_lines_become_one() -> None:
    assert explain(ValueError("one\n  two")).sentence == "one two"
    assert "send operation" in explain(TIMED_OUT).sentence and ".cc" not in explain(TIMED_OUT).sentence
    long = explain(RuntimeError("[src/gloo/pair.cc:547] Connection closed by peer. " + "More of it. " * 50))
    assert long.sentence == "a message failed because another process ended (Connection closed by peer)"
    assert len(explain(MemoryError("x" * 500)).sentence) < 300


REQUIRED = {
    "numerics": ["--steps", "5"],
    "tokenize": ["--input", "a", "--output", "b"],
    "verify": ["runs/a"],
    "inspect": ["runs/a"],
    "generate": ["runs/a"],
    "import": ["models/a", "runs/a"],
    "export": ["runs/a", "out/a"],
    "distill": ["generate", "runs/a", "--prompts", "a", "--output", "b"],
    "eval": ["runs/a"],
    "report": ["runs/a"],
    "data": ["tokens/a"],
    "watch": ["runs/a"],
}
UNKNOWN = {name: [*REQUIRED.get(name, []), "--bogus"] for name in COMMANDS}
ABBREVIATED = {name: [*REQUIRED.get(name, []), "--nam", "x"] for name in COMMANDS}
NO_VALUE = {
    "train": ["--nproc"],
    "numerics": ["--steps"],
    "tokenize": ["--output", "a", "--input"],
    "schedule": ["--pp"],
    "warmup": ["--cache"],
}
REFUSED = {
    "train": ["--cfg", "all"],
    "numerics": ["--steps", "5", "--bound", "wide"],
    "tokenize": [*REQUIRED["tokenize"], "--vocab-size", "many"],
    "schedule": ["--colour", "blue"],
    "warmup": ["--processes", "two"],
}
SAID = {
    "train": "argument --cfg: invalid choice: 'all' (choose from 'job')",
    "numerics": "argument --bound: invalid float value: 'wide'",
    "tokenize": "argument --vocab-size: invalid int value: 'many'",
    "schedule": "argument --colour: invalid choice: 'blue' (choose from 'auto', 'always', 'never')",
    "warmup": "argument --processes: invalid int value: 'two'",
}
WORDS = [
    *((name, words, "unrecognized arguments: --bogus") for name, words in UNKNOWN.items()),
    *((name, words, "unrecognized arguments: --nam") for name, words in ABBREVIATED.items()),
    *((name, words, f"argument {words[-1]}: expected ") for name, words in NO_VALUE.items()),
    *((name, words, SAID[name]) for name, words in REFUSED.items()),
    ("numerics", [], "the following arguments are required: --steps"),
    ("tokenize", ["--input", "a"], "the following arguments are required: --output"),
    ("tokenize", [*REQUIRED["tokenize"], "--tokenizer", "a", "--vocab-size", "300"], "not allowed with argument"),
    ("train", ["--nproc", "2", "--bogus", "steps=3"], "unrecognized arguments: --bogus"),
    ("train", ["--nproc", "two"], "--nproc=two must be a whole number of at least 1, or auto"),
]


@pytest.mark.parametrize(("command", "words", "says"), WORDS)
def test_a_wrong_command_line_is_one_sentence_and_code_2(
    command: str, words: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """RANK changes nothing, except for what trains: its workers have their own test."""
    monkeypatch.setattr("fp8moe.cli.train.launch", None)  # not reached: no process is started
    for rank in (None, "1") if command not in ("train", "sft", "grpo") else (None,):
        if rank is not None:
            monkeypatch.setenv("RANK", rank)
        assert main([command, *words]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1) and err.startswith("fp8moe") and says in err
        assert err.endswith(f"; see fp8moe {command} --help\n") or says.startswith("--nproc=")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        *((words, says) for command, words, says in WORDS if command == "train" and "--nproc" not in words),
        (["--nproc", "2"], "--nproc=2 starts processes and RANK is set: leave --nproc out"),
        (["--nproc"], "argument --nproc: expected one argument"),
    ],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_reports_a_wrong_command_line_once(
    rank: int,
    words: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Rank 0 prints it, every rank leaves it in the error file that torchrun reads."""
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setattr("fp8moe.train.loop.train", None)  # not reached: nothing is trained
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit) as ended:
        main(["train", *words])
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and (out, err.count("\n")) == ("", int(rank == 0)) and (rank or says in err)
    message = json.loads((tmp_path / "error.json").read_text())["message"]
    assert says in message["message"] and message["errorCode"] == 2 and message["extraInfo"]["shared"]


def test_options_stand_before_between_and_after_settings() -> None:
    for module, option in ((train, "--nproc"), (numerics, "--nproc"), (schedule, "--model"), (warmup, "--cache")):
        rest = ["--steps", "5"] if module is numerics else []
        for words in ([option, "2", "a=1", "b=2"], ["a=1", option, "2", "b=2"], ["a=1", "b=2", option, "2"]):
            arguments = parse(module.command_parser(), [*words, *rest])
            assert arguments.settings == ["a=1", "b=2"]
            assert str(getattr(arguments, option.removeprefix("--"))) == "2"
