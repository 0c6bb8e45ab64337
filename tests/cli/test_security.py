"""Files of settings that would run code if they could."""

from __future__ import annotations

from pathlib import Path

import pytest

from fp8moe.__main__ import main

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
