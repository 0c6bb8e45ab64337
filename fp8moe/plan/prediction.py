"""A configuration on a cluster, predicted: memory of every pipeline rank, time of a step, cost of a number of tokens.

Memory is by formula (`plan.memory`), time from kernel records and models (`plan.step_time`); nothing here has been
measured in the run that it is about. A batch that grows is counted token by token in the number of steps; its time is
taken at the full batch's tokens a second.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fp8moe.plan.cluster import Cluster
from fp8moe.plan.memory import RankMemory, rank_memory, worst_rank
from fp8moe.plan.step_time import StepTime, step_time
from fp8moe.train.batch import global_batch
from fp8moe.train.config import TrainConfig


@dataclass(frozen=True)
class Prediction:
    """What `fp8moe plan` says of one layout.

    config: resolved. balanced: memory of every pipeline rank where all experts get equally many tokens; imbalanced:
    where a rank gets as many as the configuration allows (None: it sets no limit). tokens: that the run is to see.
    """

    config: TrainConfig
    cluster: Cluster
    balanced: tuple[RankMemory, ...]
    imbalanced: tuple[RankMemory, ...] | None
    time: StepTime
    tokens: float

    @property
    def worst(self) -> RankMemory:
        """The pipeline rank that needs most memory, routing balanced."""
        return worst_rank(self.balanced)

    @property
    def fits(self) -> bool:
        """Whether every rank fits its GPU, routing balanced."""
        return self.worst.total <= memory_of(self.cluster)


def predict(config: TrainConfig, cluster: Cluster, tokens: float) -> Prediction:
    """The prediction of a resolved configuration. tokens: of the whole run."""
    limit, per_node = imbalance_of(config), cluster.gpus_per_node
    return Prediction(
        config,
        cluster,
        rank_memory(config, gpus_per_node=per_node),
        None if limit is None else rank_memory(config, gpus_per_node=per_node, imbalance=limit),
        step_time(config, cluster),
        tokens,
    )


def memory_of(cluster: Cluster) -> float:
    """Bytes of a GPU."""
    return cluster.memory_gb * 1e9


def imbalance_of(config: TrainConfig) -> float | None:
    """The most rows that a rank may receive, as a multiple of an even share; None without a limit."""
    return config.parallel.capacity_factor or config.parallel.max_imbalance


def tokens_of(config: TrainConfig) -> int:
    """Tokens of all steps, the smaller ones of a batch that grows included."""
    consumed, done = 0, 0
    while done < config.steps and config.batch.ramp_from is not None and consumed < config.batch.ramp_samples:
        consumed += global_batch(config.batch, consumed)
        done += 1
    return (consumed + (config.steps - done) * config.batch.sequences) * config.seq_len


def as_json(found: Prediction) -> dict[str, Any]:
    """Every figure under its name; bytes, seconds, shares of 1, US dollars."""
    config, time = found.config, found.time
    return {
        "fits": found.fits,
        "layout": layout_json(config),
        "memory": {
            "gpu": memory_of(found.cluster),
            "worst_rank": found.worst.pp_rank,
            "balanced": [_rank_json(rank) for rank in found.balanced],
            "imbalance": imbalance_of(config),
            "imbalanced": None if found.imbalanced is None else [_rank_json(rank) for rank in found.imbalanced],
        },
        "time": asdict(time),
        "tokens_per_second_per_gpu": time.tokens_per_second_per_gpu,
        "mfu": {"causal": time.mfu, "non_causal": time.mfu_noncausal},
        "run": {
            "tokens": found.tokens,
            "days": time.days(found.tokens),
            "gpu_hours": time.gpu_hours(found.tokens),
            "price": time.cost(found.tokens),
        },
    }


def layout_json(config: TrainConfig) -> dict[str, Any]:
    """The layout of a resolved configuration by name."""
    return {
        "pp": config.parallel.pp,
        "dp": config.dp,
        "ep": config.ep,
        "cp": config.parallel.cp,
        "schedule": config.parallel.schedule,
        "micro_batch": config.micro_batch,
        "num_microbatches": config.num_microbatches,
        "recompute": sorted(config.recompute),
        "cuda_graphs": config.parallel.cuda_graphs,
    }


def _rank_json(rank: RankMemory) -> dict[str, Any]:
    return {"pp_rank": rank.pp_rank, "total": rank.total, "kinds": dict(rank.kinds), "phases": dict(rank.phases)}
