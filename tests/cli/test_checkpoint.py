"""`fp8moe verify` and `fp8moe inspect` on a run's checkpoints."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from fp8moe.__main__ import main
from fp8moe.train.loop import run_to_end
from tests.train.runs import built, configured, write_corpus


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    corpus = write_corpus(tmp_path_factory.mktemp("corpus"))
    settings = [
        *corpus,
        "steps=3",
        "ema.decay=0.9",
        "checkpoint.every=1",
        "checkpoint.keep=1",
        "checkpoint.keep_every=2",
    ]
    run_to_end(built(configured(settings, f"run_dir={folder}")), time.perf_counter())
    return folder


def test_whole_ones_are_ok_and_a_damaged_one_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0].rpartition("/")[2] for line in lines] == ["step-2", "step-3"]
    assert all(": ok, 3 files, " in line for line in lines)
    file = run / "checkpoints" / "step-3" / "rank-0.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert main(["verify", str(run)]) == 3
    shown = capsys.readouterr()
    assert "step-3: rank-0.safetensors has other bytes than were written" in shown.err and "step-2: ok" in shown.out
    assert main(["verify", str(run / "checkpoints" / "step-2")]) == 0
    file.write_bytes(whole)
    assert main(["verify", str(run.parent / "nowhere")]) == 2
    assert "nowhere does not exist: name a run directory" in capsys.readouterr().err


def test_a_released_model_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    for words in (
        ["verify", str(tmp_path)],
        ["inspect", str(tmp_path)],
        ["export", str(tmp_path), str(tmp_path / "x")],
    ):
        assert main(words) == 2
        assert "is a Hugging Face directory, not a checkpoint: fp8moe import makes a run" in capsys.readouterr().err


def test_what_is_inside(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(run)]) == 0
    shown = capsys.readouterr().out
    for words in ("step-3", "3 of 3, 3 updates, 0 skipped", "24, 768 tokens of seq_len 32", "dim 64, 2 layers, 4 exp"):
        assert words in shown
    for words in (
        "100.0% of the steps, next learning rate 1.000e-04",
        "in the order of seed 0",
        "tokenizer ",
        "resolved k",
    ):
        assert words in shown, words
    state = json.loads((run / "checkpoints" / "step-3" / "state.json").read_text())
    assert f"train {state['data']['train'][:12]}," in shown and f"commit       {state['commit'] or 'unknown'}" in shown
    for words in ("ema          F32", "exp_avg      BF16", "load         I64", "rng          U8            1"):
        assert words in shown, words
    for words in ("fp8", "torch 2.", "master       F32", "exp_avg_sq   BF16", "bias         F32", "rank-0.safetensors"):
        assert words in shown, words
    (run / "checkpoints" / "step-3" / "index.json").write_text("{")
    assert main(["inspect", str(run)]) == 3
    assert capsys.readouterr().err.endswith("step-3 can't be read (it is not JSON): verify it with fp8moe verify\n")
    (run / "checkpoints" / "step-3" / "state.json").write_text("{}")
    assert main(["inspect", str(run)]) == 3
    (run / "checkpoints" / "step-3" / "state.json").unlink()
    assert main(["inspect", str(run)]) == 3
    assert "step-3/state.json can't be read (No such file or directory): verify it" in capsys.readouterr().err
