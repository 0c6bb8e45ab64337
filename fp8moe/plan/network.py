"""Seconds of messages: bytes over what a link reaches, and its latency, both the cluster's.

Rows of a dispatch follow the dispatchers (`parallel.dispatch`). Routing is even, so how many ranks or nodes a token's
experts lie on is an expectation: of E experts a token draws K without replacement, among the groups that the router
admits, and a place with e of them is missed with probability (E-e)/E * (E-e-1)/(E-1) * ...

    all_to_all     a row to each rank that holds one of its experts; both kinds of link work side by side
    node_limited   a row to each such node over the network, then to each such rank over NVLink; one hop after the
                   other, or beside that of the next chunk
    deep_ep        the same bytes, the two hops side by side

An FP8 row is its codes and a byte a scale; ids and weights of its experts travel with it. What comes back is BF16. Rows
are put together before they leave and summed when they return, on the communication stream: two passes over them.

Ranks that share sequences gather the rows that keys are made of, a collective, and send shares of their gradients in an
all-to-all (`parallel.context`). Rows are put in the order of the sequences by one pass over all of them; shares are
cut, joined and summed in FP32.

A collective over W ranks moves (W-1)/W of its bytes. Where a group has several ranks in a node, each ring crosses
between nodes on another network port, so their rates add up, to no more than NVLink's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fp8moe.kernels.fp8 import ceil_div
from fp8moe.model.config import ModelConfig
from fp8moe.plan.cluster import Cluster

SCALE_TILE = 128
FP32 = 4
ID_BYTES, WEIGHT_BYTES = 2, 4


@dataclass(frozen=True)
class Exchange:
    """How tokens reach experts: the dispatcher, ranks that share them, and ranks of those on a node."""

    dispatcher: str
    ep: int
    per_node: int
    chunks: int = 1

    @property
    def hops(self) -> int:
        """Messages that a row travels by, one behind the other."""
        return 2 if self.dispatcher == "node_limited" and self.nodes > 1 and self.per_node > 1 else 1

    @property
    def nodes(self) -> int:
        """Nodes that the ranks span."""
        return ceil_div(self.ep, self.per_node)


@dataclass(frozen=True)
class Gather:
    """The ranks that share sequences, and how many of them are on a node."""

    cp: int
    per_node: int

    def seconds(self, cluster: Cluster, tokens: float, row: float) -> float:
        """Of a gather of `row` bytes for each of a rank's tokens."""
        whole = self.cp * tokens * row
        moved = collective_seconds(cluster, self.cp, self.per_node, whole)
        return moved + 2 * whole / (cluster.hbm_gb_per_second * 1e9)

    def scatter_seconds(self, cluster: Cluster, tokens: float, values: float, wide: float) -> float:
        """Of the sums of shares, `values` of `wide` bytes for each token; both kinds of link work side by side."""
        share, near = tokens * values * wide, self.per_node
        moved = share * (near - 1) / (cluster.nvlink_gb_per_second * 1e9) + cluster.nvlink_microseconds * 1e-6
        if self.cp > near:
            network = share * (self.cp - near) / (cluster.network_gb_per_second * 1e9)
            moved = max(moved, network + cluster.network_microseconds * 1e-6)
        passes = self.cp * (4 * share + tokens * values * (wide + 2 * FP32))
        return moved + passes / (cluster.hbm_gb_per_second * 1e9)


def places_hit(model: ModelConfig, places: int) -> float:
    """Of `places` ranks or nodes that share the experts evenly: how many hold one of a token's experts, on average."""
    router, experts = model.router, model.experts.num_experts
    admitted = experts * router.top_groups / router.num_groups
    here = experts / places
    within = admitted / here  # places that the admitted groups cover
    if within <= 1:
        return 1.0
    miss = math.prod(max(0.0, 1 - here / (admitted - i)) for i in range(router.topk))
    return within * (1 - miss)


def exchange_seconds(
    model: ModelConfig, exchange: Exchange, cluster: Cluster, tokens: float, *, fp8: bool, with_ids: bool,
    roomy: bool = False,
) -> float:  # fmt: skip
    """Seconds of one message of all tokens of a micro-batch, to the experts or back; 0 where a rank has them all.

    roomy: it has room for every routing, so that each token's row goes to every rank, or as many bytes of padding.
    """
    if exchange.ep == 1:
        return 0.0
    dim, topk = model.dim, model.router.topk
    row = dim * (1 + 1 / SCALE_TILE) if fp8 else 2.0 * dim
    row += topk * (ID_BYTES + WEIGHT_BYTES) if with_ids else 0
    nodes, hops = exchange.nodes, exchange.dispatcher != "all_to_all"
    ranks_hit, nodes_hit = places_hit(model, exchange.ep), places_hit(model, nodes)
    if roomy:
        ranks_hit, nodes_hit = float(exchange.ep), float(nodes)
    far = (nodes_hit if hops else ranks_hit) * (1 - 1 / nodes)
    near = ranks_hit * ((1 - 1 / exchange.per_node) if hops and nodes > 1 else (1 / nodes - 1 / exchange.ep))
    nvlink = tokens * near * row / (cluster.nvlink_gb_per_second * 1e9) + cluster.nvlink_microseconds * 1e-6
    packing = 2 * tokens * ranks_hit * row / (cluster.hbm_gb_per_second * 1e9)
    if nodes == 1:
        return nvlink + packing
    network = tokens * far * row / (cluster.network_gb_per_second * 1e9) + cluster.network_microseconds * 1e-6
    longer, shorter = max(network, nvlink), min(network, nvlink)
    if exchange.dispatcher == "node_limited":
        return longer + shorter / exchange.chunks + packing
    return longer + packing


def collective_rate(cluster: Cluster, ranks: int, per_node: int) -> float:
    """Bytes a second of a rank in a reduce-scatter or all-gather of `ranks`, `per_node` of them on a node."""
    nvlink, network = cluster.nvlink_gb_per_second * 1e9, cluster.network_gb_per_second * 1e9
    return nvlink if ranks <= per_node else min(nvlink, network * per_node)


def collective_seconds(cluster: Cluster, ranks: int, per_node: int, size: float) -> float:
    """Seconds of a reduce-scatter or all-gather whose whole buffer is `size` bytes; 0 for one rank."""
    if ranks == 1:
        return 0.0
    hop = cluster.nvlink_microseconds if ranks <= per_node else cluster.network_microseconds
    return size * (ranks - 1) / ranks / collective_rate(cluster, ranks, per_node) + hop * 1e-6 * math.log2(ranks)


def neighbour_seconds(cluster: Cluster, dp: int, size: float) -> float:
    """Seconds of a message of `size` bytes to the next pipeline rank, which is `dp` ranks away."""
    if dp < cluster.gpus_per_node:
        return size / (cluster.nvlink_gb_per_second * 1e9) + cluster.nvlink_microseconds * 1e-6
    return size / (cluster.network_gb_per_second * 1e9) + cluster.network_microseconds * 1e-6
