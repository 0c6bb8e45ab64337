"""Seconds of a step outside the passes: gradients summed to their owners, the optimizer's update, weights gathered.

ZeRO-1 sends 4 bytes a parameter of gradients beside the last backward and 2 bytes of weights beside the next forward
(`parallel.sharding.zero`). What is exposed of each is what that backward (forward) is too short to hide, and at least
one block's share: the block whose gradients are ready last, and the one whose weights are needed first.

The update reads gradients, masters and moments and writes masters, moments and weights of the parameters that a rank
owns; the blocks of FP8 weights are made by every rank that uses them, and gradients are cleared. Muon is counted like
AdamW: the products of its orthogonalization are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from fp8moe.model.memory import stage_parameters
from fp8moe.model.partition import Stage
from fp8moe.plan.attention_work import CAST
from fp8moe.plan.cluster import Cluster
from fp8moe.plan.network import collective_seconds
from fp8moe.plan.rates import SHARES
from fp8moe.train.config import TrainConfig
from fp8moe.train.memory import replicas_of

GRADIENT, WEIGHT, MASTER = 4, 2, 4


@dataclass(frozen=True)
class RankParameters:
    """Parameters that a rank holds: of experts, and all others."""

    experts: float
    dense: float


def held(config: TrainConfig, stages: tuple[Stage, ...]) -> RankParameters:
    """What the rank of these stages holds."""
    model = config.model
    layers = [n for stage in stages for n in (*stage.layers, *([model.num_layers] if stage.mtp else []))]
    mixtures = sum(not model.is_dense(n) for n in layers)
    experts = mixtures * 3.0 * model.dim * model.experts.hidden * model.experts.num_experts / config.ep
    whole = sum(stage_parameters(model, stage, config.ep) for stage in stages)
    return RankParameters(experts, max(0.0, whole - experts))


@dataclass(frozen=True)
class UpdateTime:
    """Seconds of the two collectives as they run, what of them is exposed, and of the update."""

    reduce: float
    gather: float
    exposed: float
    update: float


def update_time(
    config: TrainConfig, cluster: Cluster, stages: tuple[Stage, ...], *, backward: float, forward: float
) -> UpdateTime:
    """Of the rank of these stages; backward, forward: seconds of one micro-batch's, which hide the two collectives."""
    mine, replicas = held(config, stages), replicas_of(config)
    blocks = max(1, sum(stage.num_layers for stage in stages))
    mirrored = 2 if config.parallel.schedule == "dualpipe" else 1
    groups = (
        (mine.dense, config.dp * mirrored, min(config.dp, cluster.gpus_per_node)),
        (mine.experts, config.dp // config.ep * mirrored, max(1, cluster.gpus_per_node // config.ep)),
    )
    shared_out = config.optimizer.sharding != "none"
    # Without owners an all-reduce sends gradients twice, and nobody's weights.
    reduce = sum(collective_seconds(cluster, ranks, near, count * GRADIENT) for count, ranks, near in groups)
    gather = sum(collective_seconds(cluster, ranks, near, count * WEIGHT) for count, ranks, near in groups)
    if not shared_out:
        reduce, gather = 2 * reduce, 0.0
    exposed = max(reduce / blocks, reduce - backward) + max(gather / blocks, gather - forward)
    owned = mine.dense / replicas[False] + mine.experts / replicas[True]
    moment = 2 if config.optimizer.moments == "bf16" else 4
    moments = (1 if config.optimizer.kind == "muon" else 2) * moment
    moved = owned * (GRADIENT + 2 * MASTER + 2 * moments + WEIGHT) + (mine.dense + mine.experts) * GRADIENT
    if config.recipe.fp8:
        moved += (mine.dense + mine.experts) * (WEIGHT + 2 * CAST)
    return UpdateTime(reduce, gather, exposed, moved / (cluster.hbm_gb_per_second * 1e9 * SHARES["update"]))
