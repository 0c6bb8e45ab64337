"""Seconds of a pipeline stage on one micro-batch: its blocks; embedding, head and MTP module at the ends.

The head computes its gradients in its forward (`model.head_loss`), so all of its time is F's. `StageCosts` are the
simulator's costs with each stage's own times, pairs included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from fp8moe.model.partition import Stage
from fp8moe.plan.cluster import Cluster
from fp8moe.plan.layer_time import BlockTime, Sizes, alone_seconds, block_time, pair_seconds
from fp8moe.plan.rates import Card, Parts, added, host_seconds, launches_of, parts_of, total
from fp8moe.plan.work import Pass, Piece, Product
from fp8moe.schedule.action import Action, Kind
from fp8moe.schedule.simulate import Costs

ENDS = "embedding, head and loss"


@dataclass(frozen=True)
class View:
    """What a time takes in beside compute: messages to experts and of keys, launches, fewer SMs beside messages."""

    messages: bool = True
    keys: bool = True
    host: bool = True
    fewer_sms: bool = True


WHOLE = View()


@dataclass(frozen=True)
class StageTime:
    """One stage: its blocks, and what stands at its ends, by F, B, W."""

    blocks: tuple[BlockTime, ...]
    ends: Mapping[str, Parts]
    launches: Mapping[str, float]
    card: Card

    def end(self, parts: str) -> float:
        """Seconds of the ends."""
        return sum(total(self.ends[part]) for part in parts)

    def host(self, parts: str, view: View) -> float:
        """Seconds that the host takes for the launches of `parts`."""
        return host_seconds(sum(self.launches[part] for part in parts)) if view.host else 0.0

    def seen(self, view: View) -> tuple[BlockTime, ...]:
        """The blocks with what the view takes in."""
        left_out = (("dispatch", "combine") if not view.messages else ()) + (("gather",) if not view.keys else ())
        blocks = self.blocks if view.fewer_sms else tuple(replace(block, beside=None) for block in self.blocks)
        return tuple(block.without(*left_out) for block in blocks) if left_out else blocks

    def alone(self, part: str, view: View = WHOLE) -> float:
        """Seconds of F, B or W with nothing beside it."""
        return max(alone_seconds(self.seen(view), part) + self.end(part), self.host(part, view))

    def backward(self, view: View = WHOLE, *, overlap: bool) -> float:
        """Seconds of the whole backward; overlap: its messages hide under its own weight gradients."""
        blocks = self.seen(view)
        seconds = pair_seconds((), blocks[::-1]) if overlap else sum(alone_seconds(blocks, part) for part in "BW")
        return max(seconds + self.end("BW"), self.host("BW", view))

    def compute(self) -> float:
        """Seconds of all compute, on all SMs."""
        return sum(block.compute(part) for block in self.blocks for part in "FBW") + self.end("FBW")

    def messages(self) -> float:
        """Seconds of all messages."""
        return sum(block.messages(part) for block in self.blocks for part in "FB")

    def parts(self) -> Parts:
        """Seconds of all compute by kind and source."""
        return added(*(block.parts[part] for block in self.blocks for part in "FBW"), *self.ends.values())


def paired(ahead: StageTime, back: StageTime, view: View = WHOLE, *, overlap: bool) -> float:
    """Seconds of the forward of one stage and the whole backward of another, overlapped or one after the other."""
    forward, backward = ahead.seen(view), back.seen(view)
    if overlap:
        seconds = pair_seconds(forward, backward[::-1])
    else:
        seconds = alone_seconds(forward, "F") + sum(alone_seconds(backward, part) for part in "BW")
    return max(seconds + ahead.end("F") + back.end("BW"), ahead.host("F", view) + back.host("BW", view))


@dataclass(frozen=True)
class StageCosts(Costs):
    """Times of every stage. forward, backward, weight and overlapped of `Costs` are not read."""

    alone: tuple[tuple[float, float, float, float], ...] = ()  # F, B, W, BW of each stage
    pairs: Mapping[tuple[int, int], float] = field(default_factory=dict)  # (F's stage, B's stage) -> FB

    def of(self, action: Action) -> float:
        """Seconds that an action takes of its rank."""
        if action.kind.is_message:
            return 0.0
        if action.kind is Kind.FB:
            assert action.paired is not None
            return self.pairs[action.stage, action.paired.stage]
        return self.alone[action.stage][(Kind.F, Kind.B, Kind.W, Kind.BW).index(action.kind)]


def ends_of(sizes: Sizes, stage: Stage) -> dict[str, list[Piece]]:
    """What a stage computes beside its blocks: look-up, final norm, head, loss, their gradients, MTP's projection."""
    model, tokens, fp8 = sizes.model, sizes.tokens, sizes.recipe.fp8
    dim, vocab = model.dim, model.vocab_size
    pieces: dict[str, list[Piece]] = {"F": [], "B": [], "W": []}
    looked_up = stage.embedding + stage.mtp
    if looked_up:
        pieces["F"].append(Pass("add", ENDS, looked_up * tokens * dim * 4))
        pieces["W"].append(Pass("add", ENDS, looked_up * tokens * dim * 10))
    for _ in range(stage.head + stage.mtp):
        pieces["F"] += [
            Pass("norm", ENDS, tokens * dim * 4),
            Product(tokens, vocab, dim),
            Pass("cross entropy", ENDS, tokens * vocab * 4),
            Product(tokens, dim, vocab),
            Product(vocab, dim, tokens, columns=True),
        ]
        pieces["B"].append(Pass("norm backward", ENDS, tokens * dim * 8.5))
    if stage.mtp:
        pieces["F"] += [Pass("norm", ENDS, 2 * tokens * dim * 4), Product(tokens, dim, 2 * dim, fp8=fp8)]
        pieces["B"] += [Product(tokens, 2 * dim, dim, fp8=fp8), Pass("norm backward", ENDS, 2 * tokens * dim * 6.5)]
        pieces["W"].append(Product(dim, 2 * dim, tokens, columns=True, fp8=fp8))
    return pieces


def stage_time(sizes: Sizes, stage: Stage, card: Card, beside: Card, cluster: Cluster) -> StageTime:
    """Times of a stage; `beside` is the card while messages run."""
    layers = [*stage.layers, *([sizes.model.num_layers] if stage.mtp else [])]
    dense = [sizes.model.is_dense(layer) for layer in layers]
    like = [_like(sizes, layer) for layer in layers]

    def timed(d: bool, n: int) -> BlockTime:
        block = block_time(sizes, d, n, card, cluster)
        return block if beside == card else replace(block, beside=block_time(sizes, d, n, beside, cluster).seconds)

    pieces = ends_of(sizes, stage)
    blocks = tuple(timed(d, n) for d, n in zip(dense, like, strict=True))
    launches = {part: sum(b.launches[part] for b in blocks) + launches_of(pieces[part]) for part in "FBW"}
    ends = {part: parts_of(pieces[part], card) for part in "FBW"}
    return StageTime(blocks, ends, launches, card)


def _like(sizes: Sizes, layer: int) -> int:
    """The first block that costs what block `layer` does, so that equal blocks are timed once."""
    model = sizes.model

    def kind(n: int) -> tuple[bool, float]:
        return model.is_dense(n), model.attention.core_flops(sizes.seq_len, causal=True, layer=n)

    return next(n for n in range(layer + 1) if kind(n) == kind(layer))
