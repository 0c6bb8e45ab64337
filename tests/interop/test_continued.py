"""Continued pretraining: a run that begins from an export validates before its first step as the exporting run ended.

Both score the same samples in the same precision. FP32 goes through an FP32 export; FP8 through one in BF16, of the
weights that training quantizes, and through one in FP8.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
import torch

from fp8moe.cli.compose import compose
from fp8moe.cli.export_model import main as export
from fp8moe.cli.import_model import main as take
from fp8moe.interop.hf_model import open_released
from fp8moe.train import loop
from fp8moe.train.build import build
from fp8moe.train.config import resolve
from fp8moe.train.processes import mesh_of
from fp8moe.train.run import Run
from tests.train.runs import SMALL, VOCABULARY, built, configured, write_corpus

WIDE = ("model.dim=128", "model.attention.kv_lora_rank=128", "model.dense_hidden=128", "model.experts.hidden=128")
QUICK = (
    *("steps=3", "batch.sequences=4", "batch.micro_batch=4", "validation.samples=4", "model.router.bias_gamma=0.2"),
    *("optimizer.schedule.peak=2e-2", "optimizer.schedule.warmup_steps=1"),
)


def begun(corpus: list[str], *settings: str) -> Run:
    """A run that may begin from a released model."""
    chosen = compose([*SMALL, *corpus, *QUICK, *settings]).config
    config, cpu = resolve(chosen, 1, open_released), torch.device("cpu")
    return build(config, mesh_of(config, cpu), cpu, Path("nowhere"), open_released)


@pytest.mark.parametrize(
    "precision, exported, widths, bound",
    [("fp32", "fp32", (), 1e-5), ("fp8", "bf16", (), 1e-3), ("fp8", "fp8", WIDE, 1e-3)],
)
def test_validation_before_the_first_step_is_the_last_of_the_exporting_run(
    precision: str, exported: str, widths: tuple[str, ...], bound: float, tmp_path: Path
) -> None:
    corpus = [*write_corpus(tmp_path), *widths, f"precision={precision}"]
    origin, out, imported = tmp_path / "origin", tmp_path / "out", tmp_path / "imported"
    summary = loop.run_to_end(built(configured([*corpus, *QUICK], f"run_dir={origin}")), time.perf_counter())
    export([str(origin), str(out), "--precision", exported])
    take([str(out), str(imported)])
    assert summary.val_loss < math.log(VOCABULARY) - 0.5, "the run learnt, so other weights would show"
    for source in (out, imported):
        run = begun(corpus, f"init_from={source}")
        assert run.step == 0 and loop._validate(run).loss == pytest.approx(summary.val_loss, rel=0, abs=bound), source
