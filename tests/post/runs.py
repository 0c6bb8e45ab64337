"""A run of GRPO small enough for a test: random weights, and a reward that they can learn within a few steps."""

from __future__ import annotations

from pathlib import Path

import torch

from fp8moe.post.grpo import Grpo
from fp8moe.train.build import build
from fp8moe.train.config import TrainConfig
from fp8moe.train.processes import mesh_of
from fp8moe.train.run import Run
from tests.train.runs import configured

SETTINGS = (
    *("data=problems", "precision=fp32", "seq_len=48", "batch.sequences=32", "batch.micro_batch=4", "optimizer=adamw"),
    *("lr_schedule=constant", "optimizer.schedule.peak=1e-3", "optimizer.schedule.warmup_steps=0", "seed=1"),
    *("model.router.aux_loss_alpha=0", "model.router.bias_gamma=0", "validation.samples=8", "optimizer.weight_decay=0"),
    *("grpo.rewards=[tests.post.given_rewards:letters]", "grpo.prompts=4", "grpo.samples=8", "grpo.max_tokens=12"),
    *("grpo.held_out_count=8", "grpo.train_count=40", "model.init_std=0.06", "report=false", "logging.every=100"),
)


def policy_config(corpus: list[str], *settings: str, world_size: int = 1) -> TrainConfig:
    """The configuration with `settings` over it; `corpus` names the tokenizer."""
    (prefix,) = (setting for setting in corpus if setting.startswith("data.paths="))
    path = prefix.removeprefix("data.paths=[").removesuffix("]")
    return configured([], *SETTINGS, f"data.tokenizer={path}.tokenizer.json", *settings, world_size=world_size)


def policy_run(config: TrainConfig) -> tuple[Run, Grpo]:
    """The run as it begins, in one process or inside `run_ranks`."""
    method, device = Grpo(), torch.device("cpu")
    run_dir = Path(config.run_dir or "nowhere")
    run = build(config, mesh_of(config, device), device, run_dir, open_data=method.open_data)
    method.begin(run)
    return run, method
