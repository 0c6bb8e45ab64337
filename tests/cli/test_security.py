"""Files of settings that would run code if they could, and secrets that a run must not write down."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fp8moe.__main__ import main
from tests.train.runs import SMALL, write_corpus

ROOT = Path(__file__).resolve().parent.parent.parent

TRAPS = {
    "a YAML tag": "!!python/object/apply:pathlib.Path.touch [{made}]\n",
    "a tag within": "steps: !!python/object/apply:pathlib.Path.touch [{made}]\n",
    "hydra's target": "model:\n  _target_: pathlib.Path\n  _args_: [{made}]\n",
    "a resolver": "name: ${{oc.env:FP8MOE_SECRET}}\n",
}


@pytest.mark.parametrize("text", TRAPS.values(), ids=TRAPS)
def test_a_file_of_settings_runs_nothing(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FP8MOE_SECRET", "hush-hush")
    made = tmp_path / "made"
    (tmp_path / "mine.yaml").write_text("# @package _global_\n" + text.format(made=made))
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(text.format(made=made))
    for words in (["experiment=./mine.yaml", "--cfg", "job"], ["--from", "run", "--cfg", "job"]):
        assert main(["train", *words]) == 2
        said = capsys.readouterr()
        assert "hush-hush" not in said.out + said.err and said.err.count("\n") == 1, said.err
    assert not made.exists()


SECRETS = {
    name: f"hush-{number}-" + "0123456789abcdef" * 2
    for number, name in enumerate(("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "DB_PASSWORD", "MY_SECRET"))
}


def test_no_secret_of_the_environment_is_in_what_a_run_leaves(tmp_path: Path) -> None:
    """A real run, wandb's record of it included (by a package that writes down all it is given), and one that fails."""
    package = tmp_path / "packages" / "wandb"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(NOTING_WANDB)
    environ = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")} | SECRETS
    environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(package.parent), str(ROOT)])}
    words = [*SMALL, *write_corpus(tmp_path), "logging.wandb=true", "run_dir=run", "profile=true"]
    said = []
    for settings, code in ((["steps=3"], 0), (["resume=auto", "steps=2"], 2)):
        done = subprocess.run(
            [sys.executable, "-m", "fp8moe", "train", *words, *settings],
            cwd=tmp_path, env=environ, capture_output=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        said.append(done.stdout + done.stderr)
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    names = {path.name for path in files}
    assert {"given", "config.yaml", "metrics.jsonl", "state.json", "rank-0.log", "trace.json", "wandb.log"} <= names
    for value in SECRETS.values():
        assert not [path for path, data in files.items() if value.encode() in data]
        assert not [text for text in said if value.encode() in text]


NOTING_WANDB = """
import sys, types

def Settings(**kept):
    return kept

def init(**kept):
    with open(kept["dir"] + "/given", "a") as file:
        print(sys.argv, kept, file=file)
    return types.SimpleNamespace(log=lambda data, step: None, finish=lambda exit_code: None, summary={})
"""
