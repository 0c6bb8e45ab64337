"""Table of what a rank of each pipeline stage holds: weights, gradients and optimizer state, by formula."""

from __future__ import annotations

from fp8moe.model.memory import rank_weights
from fp8moe.plan.memory import schedule_of
from fp8moe.plan.schedule_tables import table
from fp8moe.train.config import TrainConfig, stages_of
from fp8moe.train.memory import KINDS, replicas_of, state_bytes


def memory_table(config: TrainConfig) -> str:
    """The table of a resolved configuration, a row a pipeline rank."""
    stages, parallel, schedule = stages_of(config), config.parallel, schedule_of(config)
    rows = []
    for pp_rank in range(parallel.pp):
        held = [stages[index] for index in sorted({stage for _, stage in schedule.held_by(pp_rank)})]
        weights = rank_weights(config.model, held, config.ep)
        kinds = state_bytes(weights, config.recipe, config.optimizer, replicas_of(config))
        sizes = [f"{kinds[kind] / 1e9:.2f}" for kind in KINDS]
        names = "; ".join(map(str, held))
        rows.append((str(pp_rank), f"{weights.total / 1e9:.3f}", *sizes, f"{sum(kinds.values()) / 1e9:.2f}", names))
    replicas = replicas_of(config)
    title = (
        f"{parallel.pp * config.dp} ranks: pp={parallel.pp} dp={config.dp} ep={config.ep} {parallel.schedule}, "
        f"{config.precision.mode}; masters and moments shared out over {replicas[False]} ranks (dense) and "
        f"{replicas[True]} (experts); GB = 1e9 bytes, activations not counted"
    )
    return "\n".join([title, table(("pipeline rank", "parameters (1e9)", *KINDS, "GB in all", "stages"), rows)])
