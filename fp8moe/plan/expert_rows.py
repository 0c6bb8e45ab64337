"""Rows that a rank's experts receive of one micro-batch, by formula: what a dispatch's messages and experts hold.

Balanced routing gives every expert the same share; `imbalance` is a multiple of it on this rank, as
`parallel.max_imbalance` is. How many ranks and nodes a token visits is the mean over even choices among the groups of
experts that the router allows it. Groups of an expert are padded to 128 rows.

Legend: T tokens, K top-k, E experts, e of a rank, W ranks.
"""

from __future__ import annotations

import math

from fp8moe.kernels.row_map import most_rows
from fp8moe.layers.router import RouterConfig
from fp8moe.model.memory import TILE, ExpertRows
from fp8moe.train.config import TrainConfig


def visits(router: RouterConfig, num_experts: int, size: int) -> float:
    """Places of `size` neighbouring experts each, ranks or nodes, that hold one of a token's experts, on average."""
    if router.force_balance:  # neighbouring experts, in turn
        aligned = router.topk % size == 0 or size % router.topk == 0
        crossed = 0.0 if aligned else (router.topk - 1) / size
        return min(num_experts / size, max(1.0, router.topk / size) if aligned else 1 + crossed)
    reach = num_experts * router.top_groups // router.num_groups
    size = min(size, reach)
    missed = math.prod(max(0.0, (reach - size - i) / (reach - i)) for i in range(router.topk))
    return reach / size * (1 - missed)


def expert_rows(config: TrainConfig, imbalance: float = 1.0, *, on_gpu: bool = True) -> ExpertRows:
    """The rows of a resolved configuration's dispatch on the rank that gets `imbalance` times the even share."""
    tokens, topk = config.rank_tokens, config.model.router.topk
    num_experts, ep = config.model.experts.num_experts, config.ep
    local = num_experts // ep
    if ep == 1:
        padded = most_rows(tokens * topk, num_experts) if on_gpu else _padded(tokens * topk, num_experts, config)
        return ExpertRows(padded, arrived=tokens, slots=tokens * topk)
    if config.parallel.capacity_factor is not None:
        return _fixed_rows(config, config.parallel.capacity_factor)
    copies = min(imbalance * tokens * topk, tokens * ep * min(topk, local))
    ranks = visits(config.model.router, num_experts, local)
    arrived = min(imbalance * tokens * ranks, tokens * ep)
    sent, slots = tokens * ranks, float(tokens * min(topk, ep))
    if (per_node := _ranks_per_node(config)) is not None and per_node < ep:
        nodes = visits(config.model.router, num_experts, per_node * local)
        across = tokens * nodes  # rows that reach a node's ranks, of which each hands on what it got
        sent = across + tokens * ranks
        slots = tokens * min(topk, ep // per_node) + across * min(topk, per_node)
    return ExpertRows(_padded(copies, local, config), arrived, slots + arrived * topk, sent)


def _fixed_rows(config: TrainConfig, factor: float) -> ExpertRows:
    """The rows of fixed messages, which have the same size whatever the routing."""
    from fp8moe.parallel.dispatch.counts import Capacity, EpTopology, fixed

    tokens, router = config.rank_tokens, config.model.router
    per_node = _ranks_per_node(config)
    shape = (config.ep, 1) if per_node is None else (config.ep // per_node, per_node)
    topology = EpTopology(None, config.model.experts.num_experts, *shape)  # type: ignore[arg-type]  # sizes alone
    sizes = fixed(config.parallel.chunks, router.topk, topology, Capacity(tokens, factor))
    hops = [hop for chunk in sizes.splits for hop in chunk]
    arrived = sum(sum(chunk[-1].received) for chunk in sizes.splits)
    slots = tokens * min(router.topk, len(sizes.splits[0][0].sent)) + arrived * router.topk
    return ExpertRows(sizes.room, arrived, slots, sum(sum(hop.sent) for hop in hops))


def _ranks_per_node(config: TrainConfig) -> int | None:
    """Ranks of an expert-parallel group on one node where messages go by nodes; None where they go in one hop."""
    parallel = config.parallel
    return min(config.ep, parallel.ranks_per_node or config.ep) if parallel.dispatcher == "node_limited" else None


def _padded(copies: float, experts: int, config: TrainConfig) -> float:
    """Rows of `experts` groups that share `copies`, each padded: a remainder leaves half a tile empty on average."""
    even = math.ceil(copies / experts / TILE) * TILE * experts
    return even if config.model.router.force_balance else max(even, copies + experts * TILE / 2)
