"""Table of what a rank of each pipeline stage holds: weights, gradients and optimizer state, by formula."""

from __future__ import annotations

import torch

from fp8moe.layers.dispatch import LocalDispatcher
from fp8moe.plan.schedule_tables import table
from fp8moe.train.build import empty_model, held_stages
from fp8moe.train.config import TrainConfig, stages_of
from fp8moe.train.memory import KINDS, expected_bytes, replicas_of


def memory_table(config: TrainConfig) -> str:
    """The table of a resolved configuration, a row a pipeline rank; no memory is allocated for what it counts."""
    stages, parallel = stages_of(config), config.parallel
    local = LocalDispatcher(config.model.experts.num_experts // config.ep)  # only how many experts a rank has is asked
    rows = []
    for pp_rank in range(parallel.pp):
        model = empty_model(config, pp_rank, stages, local, torch.device("meta"))
        kinds = expected_bytes(model, config.optimizer, replicas_of(config))
        parameters = sum(p.numel() for p in model.parameters())
        sizes = [f"{kinds[kind] / 1e9:.2f}" for kind in KINDS]
        held = "; ".join(str(stages[stage]) for stage in held_stages(config, pp_rank))
        rows.append((str(pp_rank), f"{parameters / 1e9:.3f}", *sizes, f"{sum(kinds.values()) / 1e9:.2f}", held))
    replicas = replicas_of(config)
    title = (
        f"{parallel.pp * config.dp} ranks: pp={parallel.pp} dp={config.dp} ep={config.ep} {parallel.schedule}, "
        f"{config.precision.mode}; masters and moments shared out over {replicas[False]} ranks (dense) and "
        f"{replicas[True]} (experts); GB = 1e9 bytes, activations not counted"
    )
    return "\n".join([title, table(("pipeline rank", "parameters (1e9)", *KINDS, "GB in all", "stages"), rows)])
