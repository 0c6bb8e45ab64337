"""Row counts of each hop: exchanged once for both hops, or fixed beforehand.

Exact: each rank tells every other how many rows it sends to that rank's node, how many of them each rank of that node
gets, and how many copies are for each expert of the rank: a few integers a pair. With them every size of the dispatch
is known on the host, R included, and nothing waits for the device again. The exchange runs on the communication
stream; the dispatch is launched when its counts are on the host, by the phase that needs the rows at the latest.

Fixed: every message has the same number of rows, a stated multiple of an even share, and nothing is exchanged or read.
What does not fit is counted on the device and read before the optimizer step: `Overflow`.

Legend: T tokens, K top-k, E experts, e local experts, W ranks = M nodes x L ranks a node, C chunks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from fp8moe.errors import ImbalanceError
from fp8moe.kernels.fp8 import ceil_div
from fp8moe.parallel.collectives import all_reduce, exchange
from fp8moe.parallel.dispatch.hops import Splits

FOLDED = 256  # dispatches
ALIGN = 128  # rows of an expert's group are padded to a multiple


@dataclass(frozen=True)
class EpTopology:
    """Nodes and ranks of an expert-parallel group: rank w of `group` = node x ranks_per_node + local."""

    group: ProcessGroup
    num_experts: int
    nodes: int
    ranks_per_node: int

    @property
    def ranks(self) -> int:
        """W."""
        return self.nodes * self.ranks_per_node

    @property
    def local_experts(self) -> int:
        """e."""
        return self.num_experts // self.ranks

    @property
    def first_expert(self) -> int:
        """The first of this rank's experts."""
        return self.group.rank() * self.local_experts

    @property
    def local(self) -> int:
        """This rank's number in its node."""
        return self.group.rank() % self.ranks_per_node


@dataclass(frozen=True)
class MessageSizes:
    """`splits[chunk][hop]`; `room` rows R for the experts."""

    splits: list[list[Splits]]
    room: int


@dataclass(frozen=True)
class Capacity:
    """Fixed messages for batches of at most `tokens` tokens a rank, with `factor` times the even share of room.

    Infinite: with room for every routing.
    """

    tokens: int
    factor: float

    @property
    def holds_all(self) -> bool:
        """Whether nothing can overflow."""
        return math.isinf(self.factor)

    def share(self, even: float, worst: int) -> int:
        """Rows of room: at least 1, at most what could ever come."""
        return max(1, worst if self.holds_all else min(worst, math.ceil(self.factor * even)))


def hops_of(topology: EpTopology) -> tuple[bool, bool]:
    """Whether there is a hop across nodes, and one inside the node; a world of one node or of single ranks has one."""
    return topology.nodes > 1 or topology.ranks_per_node == 1, topology.ranks_per_node > 1


@dataclass(frozen=True)
class Counts:
    """What ranks told each other of a dispatch, on its way to the host: `exact`.

    host: nodes_CM, then a row [n] a rank; `copied`: when it is there, None where it is.
    """

    host: Tensor
    copied: torch.cuda.Event | None
    chunks: int
    topology: EpTopology
    max_imbalance: float | None

    def are_here(self) -> bool:
        """Whether `sizes` needs no wait."""
        return self.copied is None or self.copied.query()

    def sizes(self) -> MessageSizes:
        """The sizes of the messages; waits for the counts. ImbalanceError: see `check_imbalance`."""
        if self.copied is not None:
            self.copied.synchronize()  # the one wait
        topology, c, m, n = self.topology, self.chunks, self.topology.nodes, self.topology.ranks_per_node
        mine, nodes_CM, got = topology.local, self.host[: c * m].view(c, m), self.host[c * m :].view(m * n, -1)
        by_rank = got[:, : c * (1 + n)].view(m, n, c, 1 + n)  # of rank (node, local): its rows to my node, each rank
        across = [Splits(nodes_CM[i].tolist(), by_rank[:, mine, i, 0].tolist()) for i in range(c)]
        segments_CLM = segments(got, c, topology)
        onward = by_rank[:, mine, :, 1:].sum(0)  # [C, L]
        inside = [Splits(onward[i].tolist(), segments_CLM[i].sum(1).tolist()) for i in range(c)]
        *tokens_e, copies = got[:, c * (1 + n) :].sum(0).tolist()
        if self.max_imbalance is not None:
            check_imbalance(tokens_e, copies / topology.ranks, self.max_imbalance, topology)
        use = hops_of(topology)
        pairs = zip(across, inside, strict=True)
        splits = [[hop for hop, used in zip(pair, use, strict=True) if used] for pair in pairs]
        return MessageSizes(splits, int(padded_rows(torch.tensor(tokens_e))))


def exact(pieces: tuple[Tensor, ...], topology: EpTopology, max_imbalance: float | None) -> Counts:
    """Exchange the counts for expert ids `pieces` [T, K], one a chunk, and send them to the host. Collective."""
    c, m, n, e = len(pieces), topology.nodes, topology.ranks_per_node, topology.local_experts
    rows_CW = torch.stack([_visits(ids // e, m * n).sum(0) for ids in pieces])
    nodes_CM = rows_CW if n == 1 else torch.stack([_visits(ids // (e * n), m).sum(0) for ids in pieces])
    experts_We = _copies(torch.cat(pieces), m * n * e).view(m * n, e)
    to_node = torch.cat([nodes_CM.T[:, :, None], rows_CW.view(c, m, n).permute(1, 0, 2)], dim=2)  # [M, C, 1 + L]
    copies_W1 = experts_We.sum().expand(m * n, 1)
    send = torch.cat([to_node.reshape(m, -1).repeat_interleave(n, 0), experts_We, copies_W1], dim=1)
    found = torch.cat([nodes_CM.flatten(), exchange(send, topology.group, "counts").flatten()])
    if found.device.type != "cuda":
        return Counts(found, None, c, topology, max_imbalance)
    host = torch.empty(found.shape, dtype=found.dtype, pin_memory=True).copy_(found, non_blocking=True)
    return Counts(host, torch.cuda.current_stream(found.device).record_event(), c, topology, max_imbalance)


def segments(got: Tensor, chunks: int, topology: EpTopology) -> Tensor:
    """Of the counts [W, n] that arrived: rows for this rank of each chunk, local index and node, [C, L, M]."""
    m, n = topology.nodes, topology.ranks_per_node
    by_rank = got[:, : chunks * (1 + n)].view(m, n, chunks, 1 + n)
    return by_rank[..., 1 + topology.local].permute(2, 1, 0)


def padded_rows(tokens_e: Tensor) -> Tensor:
    """Rows [..., e] of groups, each padded to ALIGN, together: [...]."""
    return ((tokens_e + (ALIGN - 1)) // ALIGN * ALIGN).sum(dim=-1)


def check_imbalance(tokens_e: list[int], copies: float, limit: float, topology: EpTopology) -> None:
    """ImbalanceError where this rank would receive more than `limit` times the even share, `copies` rows."""
    if sum(tokens_e) > limit * copies:
        first = topology.first_expert
        raise ImbalanceError(
            f"this rank would receive {sum(tokens_e)} rows, {sum(tokens_e) / max(copies, 1):.2f} times the even share, "
            f"and parallel.max_imbalance={limit} allows {int(limit * copies)}: raise it, or lower batch.micro_batch "
            f"(tokens per expert from expert {first} on: {histogram(tokens_e)})"
        )


def histogram(tokens: list[int]) -> str:
    """Counts in words; of many, the largest."""
    if len(tokens) <= 64:
        return ", ".join(map(str, tokens))
    largest = sorted(range(len(tokens)), key=lambda i: -tokens[i])[:16]
    return ", ".join(f"{i}: {tokens[i]}" for i in largest) + f", mean {sum(tokens) / len(tokens):.1f}"


def _copies(ids_TK: Tensor, num_experts: int) -> Tensor:
    """Copies for each expert: int64 [E]."""
    flat = ids_TK.reshape(-1)
    return flat.new_zeros(num_experts).scatter_add_(0, flat, flat.new_ones(1).expand_as(flat))


def _visits(peer_TK: Tensor, peers: int) -> Tensor:
    """Which peers each token visits: [T, peers] bool."""
    return torch.zeros(len(peer_TK), peers, dtype=torch.bool, device=peer_TK.device).scatter_(1, peer_TK, True)


def fixed(chunks: int, topk: int, topology: EpTopology, capacity: Capacity) -> MessageSizes:
    """The sizes that need no counts: padded messages, the same on every rank."""
    m, n = topology.nodes, topology.ranks_per_node
    tokens = ceil_div(capacity.tokens, chunks)
    across = capacity.share(tokens * min(topk, m) / m, tokens)
    gathered = m * across if m > 1 else tokens
    even = tokens * min(topk, topology.ranks) / topology.ranks * m
    inside = capacity.share(even, gathered)
    use = hops_of(topology)
    hops = (Splits([across] * m, [across] * m, fixed=True), Splits([inside] * n, [inside] * n, fixed=True))
    arrived = chunks * (n * inside if n > 1 else m * across)
    copies = capacity.share(capacity.tokens * topk, arrived * min(topk, topology.local_experts))
    # Each group ends in a tile that is not full: at worst one tile of padding an expert.
    room = (ceil_div(copies, ALIGN) + topology.local_experts) * ALIGN
    return MessageSizes([[hop for hop, used in zip(hops, use, strict=True) if used]] * chunks, room)


@dataclass(frozen=True)
class Needed:
    """Rows that a dispatch needed room for: those for each peer, of every hop and chunk, and those of local experts."""

    hops: list[Tensor]
    experts: Tensor


class Overflow:
    """Which dispatches did not fit since the last check; noted without a wait, read once a step.

    What a dispatch needed is kept as it is, two or three small tensors, and compared with its room FOLDED dispatches at
    a time: a launch each would be more of the host's time, and keeping all of them memory where no step ends for long.
    """

    def __init__(self, topology: EpTopology, capacity: Capacity) -> None:
        self._topology, self._capacity = topology, capacity
        self._needed: list[Needed] = []
        self._sizes: MessageSizes | None = None  # of all of them
        self._state: Tensor | None = None  # [1 + E] int64: dispatches that overflowed, tokens per expert

    def note(self, needed: Needed, sizes: MessageSizes, ids_TK: Tensor) -> None:
        """Add a dispatch: what it needed, what it had, which dispatches share, and the ids that this rank sent."""
        if self._state is None:
            self._state = torch.zeros(1 + self._topology.num_experts, dtype=torch.int64, device=ids_TK.device)
            self._one = torch.ones(1, dtype=torch.int64, device=ids_TK.device)
        self._needed.append(needed)
        self._sizes = sizes
        flat = ids_TK.reshape(-1)
        self._state[1:].scatter_add_(0, flat, self._one.expand_as(flat))
        if len(self._needed) == FOLDED:
            self._fold(self._state)

    def _fold(self, state: Tensor) -> None:
        """Count those of the dispatches kept that did not fit, and keep them no longer."""
        if not self._needed:
            return
        assert self._sizes is not None
        over = padded_rows(torch.stack([one.experts for one in self._needed])) > self._sizes.room
        sent = [hop.sent[0] for chunk in self._sizes.splits for hop in chunk]
        for rows, *needed in zip(sent, *(one.hops for one in self._needed), strict=True):
            over |= (torch.stack(needed) > rows).any(dim=1)
        state[0] += over.sum()
        self._needed = []

    def check(self) -> None:
        """ImbalanceError on every rank if anything overflowed on one since the last check. Collective; waits."""
        if self._state is None:
            return
        self._fold(self._state)
        overflowed, *tokens = all_reduce(self._state, self._topology.group, dist.ReduceOp.SUM).tolist()
        self._state = None
        if overflowed:
            raise ImbalanceError(
                f"{overflowed} of this step's dispatches had more rows than parallel.capacity_factor="
                f"{self._capacity.factor} has room for, so no step is taken: raise it, or use "
                f"parallel.capacity_factor=null for exact counts "
                f"(tokens per expert since the last step: {histogram(tokens)})"
            )
