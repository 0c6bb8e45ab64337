"""Table of a model's pipeline ranks: stages, work, parameters, and activations at their fullest moment."""

from fp8moe.model.config import ModelConfig
from fp8moe.model.memory import MicroBatch, rank_parameters, stage_activation_bytes
from fp8moe.model.partition import Stage, imbalance, relative_costs
from fp8moe.plan.schedule_tables import table
from fp8moe.schedule.simulate import Timeline, peak_held


def partition_table(
    config: ModelConfig, stages: tuple[Stage, ...], timeline: Timeline, sizes: MicroBatch, ep: int
) -> str:
    """Each rank's stages, work relative to the average, parameters, and activations at its fullest moment."""
    schedule = timeline.schedule
    costs = relative_costs(config, stages, sizes.seq_len)
    size = [stage_activation_bytes(config, stage, sizes) for stage in stages]
    held = peak_held(schedule, size)
    rows = []
    for rank in range(schedule.num_ranks):
        here = [stages[index] for index in sorted({stage for _, stage in schedule.held_by(rank)})]
        work = sum(costs[stage.index] for stage in here) / len(here)
        rows.append(
            (
                f"rank {rank}",
                f"{work:.3f}",
                f"{rank_parameters(config, here, ep) / 1e9:.3f}",
                f"{held[rank] / 2**30:.2f}",
                f"{timeline.peak_activations[rank]:g}",
                "; ".join(str(stage) for stage in here),
            )
        )
    again = ", ".join(sorted(sizes.recipe.recompute)) or "nothing"
    title = (
        f"{schedule.num_stages} stages of {config.num_layers} blocks, layout "
        f"{','.join(str(stage.num_layers) for stage in stages)}; heaviest rank "
        f"{imbalance(config, stages, sizes.seq_len, schedule.is_folded):.3f} of the average; ep={ep}; activations of "
        f"{sizes.tokens} tokens a micro-batch, {sizes.recipe.precision}, recomputed: {again}"
    )
    header = ("", "work", "parameters (1e9)", "activations (GiB)", "held", "stages")
    return "\n".join([title, table(header, rows)])
