"""Seconds of a block's pass, alone and in an overlapped pair: compute phases and messages on two streams.

Phases start in the order of `parallel.overlap.PAIR`, and a message starts when what stands before it is computed.
Compute waits for a message where its phase reads it; where ranks share sequences the beginning of attn's forward, the
queries' projections, does not read the gather yet. So a pair of blocks takes the longer of compute and messages, and
whatever of a message finds nothing to hide under. In a pair, products and attention have the SMs that
`parallel.communication_sms` leaves.

The host launches one kernel after another: a pass takes no less than its launches take. Those of messages are made by
another thread and left out.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from fp8moe.layers.attention.context_bytes import gathered_values, row_bytes
from fp8moe.layers.recipe import Recipe
from fp8moe.model.config import ModelConfig
from fp8moe.parallel.overlap import PAIR
from fp8moe.plan.attention_work import add_attention
from fp8moe.plan.cluster import Cluster
from fp8moe.plan.mlp_work import add_mlp
from fp8moe.plan.network import Exchange, Gather, exchange_seconds
from fp8moe.plan.rates import Card, Parts, added, launches_of, parts_of, total
from fp8moe.plan.work import BlockWork

COMPUTE = ("keys", "queries", "attn", "mlp")
MESSAGES = ("gather", "dispatch", "combine")


@dataclass(frozen=True)
class Sizes:
    """What a block's time depends on beside its number: a rank's tokens of a micro-batch, how they reach the experts.

    gather: of the ranks that share sequences; None: nobody does. imbalance: what the busiest rank receives over an even
    share. padding: length of messages over that of even ones.
    """

    model: ModelConfig
    recipe: Recipe
    tokens: int
    seq_len: int
    exchange: Exchange
    imbalance: float = 1.0
    padding: float = 1.0
    gather: Gather | None = None

    @property
    def cp(self) -> int:
        """Ranks that share sequences."""
        return 1 if self.gather is None else self.gather.cp


@dataclass(frozen=True)
class BlockTime:
    """Of one block: seconds of each (part, phase), messages included, launches of F, B and W, and compute by kind."""

    seconds: dict[tuple[str, str], float]
    launches: dict[str, int]
    parts: dict[str, Parts]

    def compute(self, part: str) -> float:
        """Seconds of compute in F, B or W."""
        return sum(self.seconds.get((part, phase), 0.0) for phase in COMPUTE)

    def messages(self, part: str) -> float:
        """Seconds of messages in F or B."""
        return sum(self.seconds.get((part, phase), 0.0) for phase in MESSAGES)

    def alone(self, part: str) -> float:
        """Seconds of F, B or W with nothing beside it: only the queries' projections hide a message, the gather."""
        hidden = min(self.seconds.get((part, "queries"), 0.0), self.seconds.get((part, "gather"), 0.0))
        return self.compute(part) + self.messages(part) - hidden

    def without(self, *phases: str) -> BlockTime:
        """The same without those messages."""
        others = {key: seconds for key, seconds in self.seconds.items() if key[1] not in phases}
        return BlockTime(others, self.launches, self.parts)


@functools.lru_cache(maxsize=2048)
def block_time(sizes: Sizes, dense: bool, layer: int, card: Card, cluster: Cluster) -> BlockTime:
    """Times of a block like number `layer`, on a card."""
    s, fp8 = sizes, sizes.recipe.fp8
    work = BlockWork()
    add_attention(work, s.model, s.recipe, layer, s.tokens, s.seq_len, s.cp)
    add_mlp(work, s.model, s.recipe, layer, s.tokens, s.exchange.ep, s.imbalance)
    seconds: dict[tuple[str, str], float] = {}
    launches, parts = {}, {}
    for part in "FBW":
        phases = {phase: getattr(work, phase)[part] for phase in COMPUTE}
        timed = {phase: parts_of(pieces, card) for phase, pieces in phases.items()}
        seconds |= {(part, phase): total(one) for phase, one in timed.items() if phases[phase]}
        parts[part] = added(*timed.values())
        launches[part] = sum(launches_of(pieces) for pieces in phases.values())
    if not dense and s.exchange.ep > 1:
        for part, phase, coded, ids in (
            ("F", "dispatch", fp8, True),
            ("F", "combine", False, False),
            ("B", "combine", fp8, False),
            ("B", "dispatch", False, False),
        ):
            rows = s.tokens * max(s.imbalance, s.padding)
            seconds[part, phase] = exchange_seconds(s.model, s.exchange, cluster, rows, fp8=coded, with_ids=ids)
    if s.gather is not None:
        a, wide = s.model.attention, s.recipe.dtype.itemsize
        seconds["F", "gather"] = s.gather.seconds(cluster, s.tokens, row_bytes(a, s.recipe))
        seconds["B", "gather"] = s.gather.scatter_seconds(cluster, s.tokens, gathered_values(a), wide)
    return BlockTime(seconds, launches, parts)


# PAIR, and before attn's forward what of it does not read the gather.
ORDER = tuple(step for at in PAIR for step in ((("F", "queries"), at) if at == ("F", "attn") else (at,)))
# The messages that a phase of compute reads: its own block's, or the block's before it for what begins a forward.
_READS = {("F", "keys"): (("F", "combine"),), ("F", "attn"): (("F", "combine"), ("F", "gather")),
          ("B", "mlp"): (("B", "combine"),), ("F", "mlp"): (("F", "dispatch"),), ("B", "attn"): (("B", "dispatch"),),
          ("B", "keys"): (("B", "gather"),)}  # fmt: skip


def pair_seconds(forward: Sequence[BlockTime], backward: Sequence[BlockTime], *, overlap: bool = True) -> float:
    """Seconds of the forward of some blocks beside the whole backward of others, both in the order they run.

    Either may be empty. overlap=False: one phase after the other, messages too.
    """
    compute = messages = 0.0  # when each stream is free
    arrived: dict[tuple[str, str], float] = {}
    for ahead, back in zip_longest(forward, backward):
        for part, phase in ORDER:
            block = ahead if part == "F" else back
            if block is None or (part, phase) not in block.seconds:
                continue
            length = block.seconds[part, phase]
            if phase in MESSAGES:
                messages = max(messages, compute) + length
                arrived[part, phase] = messages
                if not overlap:
                    compute = messages
            else:
                read = (arrived.get(message, 0.0) for message in _READS.get((part, phase), ()))
                compute = max(compute, *read, 0.0) + length
    return max(compute, messages)


def alone_seconds(blocks: Sequence[BlockTime], part: str) -> float:
    """Seconds of the F, B or W of some blocks with nothing beside it."""
    return sum(block.alone(part) for block in blocks)
