"""A run goes on by its own command: another one says which, and how to begin from its weights."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from fp8moe.__main__ import main
from fp8moe.cli.command import make_parser
from fp8moe.cli.compose import as_yaml, compose
from fp8moe.cli.resume import compose_run
from fp8moe.cli.train import Command

SETTINGS = {
    "train": ["experiment=quickstart"],
    "sft": ["experiment=sft", "seq_len=256", "data.paths=[a.jsonl]", "data.tokenizer=t.json"],
    "grpo": ["experiment=grpo", "seq_len=256", "data.tokenizer=t.json", "batch.sequences=256"],
}
SOURCES = {"train": "stdlib", "sft": "chat", "grpo": "problems"}
LEARNS_FROM = {"train": "text or conversations", "sft": "conversations", "grpo": "problems"}


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, Path]:
    """A run directory of each command, as far as configurations are concerned; their paths have a space."""
    folders = {}
    for command, settings in SETTINGS.items():
        folders[command] = tmp_path / f"my {command}"
        step = folders[command] / "checkpoints" / "step-1"
        step.mkdir(parents=True)
        for name in ("state.json", "manifest.json"):
            (step / name).touch()
        (folders[command] / "config.yaml").write_text(as_yaml(compose(settings).config))
    return folders


@pytest.mark.parametrize(
    ("command", "of"), [("sft", "train"), ("sft", "grpo"), ("grpo", "train"), ("grpo", "sft"), ("train", "grpo")]
)
def test_another_command_says_which_and_how_to_begin(
    runs: dict[str, Path], command: str, of: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run, checkpoint = str(runs[of]), f"{runs[of]}/checkpoints/step-1"
    more = ["data.chat_template=plain"] if command == "sft" else []
    for named, words, again in (
        (run, [f"resume={run}"], "go on with it"),
        (checkpoint, [f"resume={checkpoint}"], "go on with it"),
        (run, ["resume=auto", f"run_dir={run}"], "go on with it"),
        (run, ["--from", run], "begin another like it"),
    ):
        assert main([command, *words, *more]) == 2
        files = "data.paths=[FILE] " if command == "sft" else ""
        begin = f"begin from its weights by fp8moe {command} 'init_from={named}' {files}run_dir=NEW, or "
        assert capsys.readouterr().err == (
            f"fp8moe: {named} is a run of fp8moe {of}, on data.source={SOURCES[of]}, and fp8moe {command} learns from "
            f"{LEARNS_FROM[command]}: {'' if command == 'train' else begin}{again} by fp8moe {of} {shlex.join(words)}\n"
        )


def test_a_new_run_learns_from_the_data_of_its_command(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for command, source, more, use in (
        ("sft", "stdlib", ["experiment=quickstart", "data.paths=[a.jsonl]"], "chat"),
        ("sft", "indexed", ["data.source=indexed", "data.paths=[tokens]"], "chat"),
        ("grpo", "stdlib", ["experiment=quickstart"], "problems"),
    ):
        assert main([command, f"init_from={runs['train']}", *more]) == 2
        assert capsys.readouterr().err == (
            f"fp8moe: fp8moe {command} learns from {LEARNS_FROM[command]}, data.source={use}, and data.source={source} "
            f"is of fp8moe train: use data.source={use}\n"
        )


def test_its_own_command_and_train_go_on(runs: dict[str, Path]) -> None:
    for command, of in (("train", "train"), ("sft", "sft"), ("grpo", "grpo"), ("train", "sft")):
        composed, _ = compose_run([f"resume={runs[of]}"], 1, command=command)
        assert composed.config.data.source == SOURCES[of]
    chats = ["data=chat", "data.paths=[a.jsonl]", "data.tokenizer=t.json"]
    composed, _ = compose_run(chats, 1, str(runs["train"]), command="sft")  # other data were typed
    assert composed.config.data.source == "chat"


def test_a_run_ends_with_the_command_that_goes_on_with_it(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: dict[str, Any] = {}
    monkeypatch.setattr(
        "fp8moe.train.loop.train", lambda config, as_yaml, released, last, *more: ended.update(last=last)
    )
    for command, of in (("train", "train"), ("sft", "sft"), ("grpo", "grpo"), ("train", "sft")):
        config = compose_run([f"resume={runs[of]}"], 1, command=command)[0].config
        config = replace(config, validation=replace(config.validation, completions=0))
        Command(command, lambda: make_parser("", ""), method=Mock() if command == "grpo" else None).train(config)
        data = SimpleNamespace(chat=None, tokenizer=None)
        run = SimpleNamespace(saver=SimpleNamespace(newest=1), run_dir=runs[of], data=data, config=config)
        words = shlex.split(ended["last"](run).splitlines()[-1])
        assert words == ["fp8moe", of, f"resume={runs[of]}", f"steps={2 * config.steps}"]
        assert compose_run(words[2:], 1, command=words[1])[0].config.steps == 2 * config.steps
