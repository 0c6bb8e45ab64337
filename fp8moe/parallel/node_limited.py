"""Dispatch in two hops: a token crosses to each node once, and is forwarded inside it (DeepSeek-V3 report, 3.2.2).

The first hop goes to the peer of the same local index on each node that holds one of the token's experts (at most M of
them, where the router limits groups), the second from there to the ranks that hold them. On the way back each node
adds its ranks' partial sums before one row a (token, node) crosses. Experts receive the same rows in the same order as
by one hop; sums associate differently: experts of a rank, then ranks of a node, then nodes.
"""

from __future__ import annotations

from torch.distributed import ProcessGroup

from fp8moe.parallel.counts import Capacity, Places
from fp8moe.parallel.expert_parallel import AllToAllDispatcher
from fp8moe.parallel.way import Axis


class NodeLimitedDispatcher(AllToAllDispatcher):
    """`group` is nodes of `ranks_per_node` neighbours. rail: ranks of one local index; node: ranks of one node.

    Either may be None where it would be this rank alone. Other arguments as `AllToAllDispatcher` has them.
    """

    def __init__(
        self,
        group: ProcessGroup,
        rail: ProcessGroup | None,
        node: ProcessGroup | None,
        num_experts: int,
        *,
        chunks: int = 1,
        capacity: Capacity | None = None,
        max_imbalance: float | None = None,
    ) -> None:
        nodes, local = (1 if g is None else g.size() for g in (rail, node))
        assert nodes * local == group.size(), (nodes, local, group.size())
        self._place(Places(group, num_experts, nodes, local), chunks, capacity, max_imbalance)
        e = self.num_local_experts
        axes = (None if rail is None else Axis(rail, local * e), None if node is None else Axis(node, e))
        self.axes = tuple(axis for axis in axes if axis is not None)
