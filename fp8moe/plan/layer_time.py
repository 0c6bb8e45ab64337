"""Seconds of a block's pass, alone and in an overlapped pair: compute phases and messages on two streams.

Phases start in the order of `parallel.overlap.PAIR`, and a message starts when what stands before it is computed.
Compute waits for a message where its phase reads it. Two phases begin with what does not read it yet: attn's forward
with the queries' projections, where ranks share sequences, and mlp with the shared experts. So a pair of blocks takes
the longer of compute and messages, and whatever of a message finds nothing to hide under. From a message's start to
where it is waited for, products and attention have the SMs that `parallel.communication_sms` leaves.

The host launches one kernel after another, those of messages too: a pass takes no less than its launches take.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from fp8moe.layers.attention.context_bytes import gathered_values, row_bytes
from fp8moe.layers.recipe import Recipe
from fp8moe.model.config import ModelConfig
from fp8moe.parallel.overlap import LEFT_OVER, PAIR
from fp8moe.plan.attention_work import add_attention
from fp8moe.plan.cluster import Cluster
from fp8moe.plan.mlp_work import add_mlp
from fp8moe.plan.network import Exchange, Gather, exchange_seconds
from fp8moe.plan.rates import Card, Parts, added, launches_of, message_launches, parts_of, total
from fp8moe.plan.work import BlockWork

COMPUTE = ("keys", "queries", "attn", "shared", "mlp")
MESSAGES = ("gather", "dispatch", "combine")


@dataclass(frozen=True)
class Sizes:
    """What a block's time depends on beside its number: a rank's tokens of a micro-batch, how they reach the experts.

    gather: of the ranks that share sequences; None: nobody does. imbalance: what the busiest rank receives over an even
    share. padding: length of messages over that of even ones. exact: counts are exchanged, and messages as long.
    """

    model: ModelConfig
    recipe: Recipe
    tokens: int
    seq_len: int
    exchange: Exchange
    imbalance: float = 1.0
    padding: float = 1.0
    exact: bool = True
    gather: Gather | None = None

    @property
    def cp(self) -> int:
        """Ranks that share sequences."""
        return 1 if self.gather is None else self.gather.cp


@dataclass(frozen=True)
class BlockTime:
    """Of one block: seconds of each (part, phase), messages included, launches of F, B and W, and compute by kind.

    beside: the seconds while a message is in flight; None: they are the same.
    """

    seconds: Mapping[tuple[str, str], float]
    launches: Mapping[str, float]
    parts: Mapping[str, Parts]
    beside: Mapping[tuple[str, str], float] | None = None

    def compute(self, part: str) -> float:
        """Seconds of compute in F, B or W."""
        return sum(self.seconds.get((part, phase), 0.0) for phase in COMPUTE)

    def messages(self, part: str) -> float:
        """Seconds of messages in F or B."""
        return sum(self.seconds.get((part, phase), 0.0) for phase in MESSAGES)

    def of(self, step: tuple[str, str], *, beside: bool) -> float:
        """Seconds of a step of compute, of 0 where the block has none; beside a message or not."""
        seconds = self.beside if beside and self.beside is not None else self.seconds
        return seconds.get(step, 0.0)

    def without(self, *phases: str) -> BlockTime:
        """The same without those messages."""
        return replace(self, seconds={key: seconds for key, seconds in self.seconds.items() if key[1] not in phases})


@functools.lru_cache(maxsize=2048)
def block_time(sizes: Sizes, dense: bool, layer: int, card: Card, cluster: Cluster) -> BlockTime:
    """Times of a block like number `layer`, on a card."""
    s, fp8 = sizes, sizes.recipe.fp8
    work = BlockWork()
    add_attention(work, s.model, s.recipe, layer, s.tokens, s.seq_len, s.cp)
    add_mlp(work, s.model, s.recipe, layer, s.tokens, s.exchange.ep, s.imbalance)
    seconds: dict[tuple[str, str], float] = {}
    launches: dict[str, float] = {}
    parts = {}
    for part in "FBW":
        phases = {phase: getattr(work, phase)[part] for phase in COMPUTE}
        timed = {phase: parts_of(pieces, card) for phase, pieces in phases.items()}
        seconds |= {(part, phase): total(one) for phase, one in timed.items() if phases[phase]}
        parts[part] = added(*timed.values())
        launches[part] = sum(launches_of(pieces) for pieces in phases.values())
    if not dense and s.exchange.ep > 1:
        permutations = {"F": 2, "B": 2, "W": 0}  # among the pieces
        for part, count in message_launches(s.exchange.hops, exact=s.exact).items():
            launches[part] += count - permutations[part]
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


# PAIR, and before attn's forward and mlp what of them reads no message.
_AHEAD = {("F", "attn"): "queries", **{(part, "mlp"): "shared" for part in "FBW"}}
ORDER = tuple(step for at in PAIR for step in (((at[0], _AHEAD[at]), at) if at in _AHEAD else (at,)))
# The messages that a phase of compute reads: its own block's, or the block's before it for what begins a forward.
_READS = {("F", "keys"): (("F", "combine"),), ("F", "attn"): (("F", "combine"), ("F", "gather")),
          ("B", "mlp"): (("B", "combine"),), ("F", "mlp"): (("F", "dispatch"),), ("B", "attn"): (("B", "dispatch"),),
          ("B", "keys"): (("B", "gather"),)}  # fmt: skip


class _Streams:
    """When compute and messages are done with what they have been given, and which messages nobody has waited for."""

    def __init__(self) -> None:
        self.computed = self.messaged = 0.0
        self._in_flight: dict[tuple[str, str], float] = {}  # when it arrives

    def message(self, step: tuple[str, str], seconds: float) -> None:
        """Start a message when compute is done."""
        self.messaged = max(self.messaged, self.computed) + seconds
        self._in_flight[step] = self.messaged

    def compute(self, block: BlockTime, step: tuple[str, str]) -> None:
        """Compute when the messages that the step reads have arrived."""
        for message in _READS.get(step, ()):
            self.computed = max(self.computed, self._in_flight.pop(message, 0.0))
        self.computed += block.of(step, beside=bool(self._in_flight))


def pair_seconds(forward: Sequence[BlockTime], backward: Sequence[BlockTime], *, wgrads: bool = True) -> float:
    """Seconds of the forward of some blocks beside the backward of others, both in the order they run.

    Either may be empty. wgrads=False: a backward that leaves its weight gradients for later.
    """
    streams = _Streams()
    left_over: tuple[BlockTime, tuple[str, str]] | None = None
    for ahead, back in zip_longest(forward, backward):
        first = "keys" if back is not None and ("B", "keys") in back.seconds else "attn"  # left over for the next block
        for step in ORDER:
            block = ahead if step[0] == "F" else back
            if step == LEFT_OVER and left_over is not None:
                streams.compute(*left_over)
                left_over = None
            elif block is None or step not in block.seconds or step == ("W", first) or (step[0] == "W" and not wgrads):
                continue
            elif step[1] in MESSAGES:
                streams.message(step, block.seconds[step])
            else:
                streams.compute(block, step)
        if back is not None and wgrads:
            left_over = back, ("W", first)
    if left_over is not None:
        streams.compute(*left_over)
    return max(streams.computed, streams.messaged)


def alone_seconds(blocks: Sequence[BlockTime], part: str) -> float:
    """Seconds of the F, B or W of some blocks with nothing beside it."""
    if part == "W":
        return sum(block.compute("W") for block in blocks)
    return pair_seconds(blocks, ()) if part == "F" else pair_seconds((), blocks[::-1], wgrads=False)
