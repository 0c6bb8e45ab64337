"""Which layouts of a configuration fit a memory, without the formulas for each of thousands.

Memory grows with the micro-batch and falls with what is computed again: by that, one layout that is far too large
speaks for larger micro-batches, and one that is far smaller than the limit for all that is computed again beside it.
Far is MARGIN, because neither is exact: a larger micro-batch makes fewer of them, and an allowance is counted by block
of each that is held. Between the two every layout has its own figure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from fp8moe.layers.recipe import Recompute
from fp8moe.plan.layouts import layouts, recompute_sets
from fp8moe.plan.memory import rank_memory, worst_rank
from fp8moe.train.config import TrainConfig

MARGIN = 1.05
Names = tuple[Recompute, ...]
Group = tuple[int, str, int, int, bool]  # pp, schedule, ep, cp, CUDA graphs
Key = tuple[Group, int, Names]


@dataclass
class Layouts:
    """Every legal layout of a configuration; the memory of each is computed once, when it is asked for.

    recomputed: what the backward may compute again, the least first. groups: (pp, schedule, ep, cp, CUDA graphs) ->
    layouts of growing micro-batch that compute again all they can. imbalance: rows that the busiest rank's experts
    get, as a multiple of an even share.
    """

    gpus_per_node: int
    recomputed: list[Names]
    groups: dict[Group, list[TrainConfig]]
    imbalance: float = 1.0
    known: dict[Key, float] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Legal layouts."""
        return sum(map(len, self.groups.values())) * len(self.recomputed)

    def bytes(self, config: TrainConfig) -> float:
        """What the worst rank of a layout needs."""
        key = key_of(config)
        if key not in self.known:
            ranks = rank_memory(config, gpus_per_node=self.gpus_per_node, imbalance=self.imbalance)
            self.known[key] = worst_rank(ranks).total
        return self.known[key]

    def fitting(self, limit: float) -> list[list[TrainConfig]]:
        """Those that need at most `limit` bytes: a list for each group and micro-batch, least recomputed first."""
        return [fit for group in self.groups.values() for fit in self._fitting(group, limit)]

    def _fitting(self, group: Sequence[TrainConfig], limit: float) -> Iterator[list[TrainConfig]]:
        if self.bytes(replace(group[-1], recompute=self.recomputed[0])) * MARGIN <= limit:
            yield from ([replace(one, recompute=names) for names in self.recomputed] for one in group)
            return
        for one in group:
            if self.bytes(one) > limit * MARGIN:
                return
            every = [replace(one, recompute=names) for names in self.recomputed]
            if self.bytes(every[0]) * MARGIN > limit:
                every = [config for config in every if self.bytes(config) <= limit]
            if every:
                yield every

    def least(self) -> TrainConfig:
        """The layout that needs least memory: with the smallest micro-batch, all recomputed that can be."""
        return min((group[0] for group in self.groups.values()), key=self.bytes)


def legal_layouts(
    config: TrainConfig, gpus: int, gpus_per_node: int, *, near: bool = False, imbalance: float = 1.0
) -> Layouts:
    """Every legal layout of a configuration, which need not be resolved; near: see `layouts.layouts`."""
    recomputed = recompute_sets(config.precision.mode)
    groups: dict[Group, list[TrainConfig]] = {}
    for one in layouts(config, gpus, gpus_per_node, recomputed[-1:], near=near):
        groups.setdefault(_group_of(one), []).append(one)
    return Layouts(gpus_per_node, recomputed, groups, imbalance)


def key_of(config: TrainConfig) -> Key:
    """What tells the layouts of one configuration apart."""
    return _group_of(config), config.micro_batch, config.recompute


def _group_of(config: TrainConfig) -> Group:
    parallel = config.parallel
    return parallel.pp, parallel.schedule, config.ep, parallel.cp, parallel.cuda_graphs
