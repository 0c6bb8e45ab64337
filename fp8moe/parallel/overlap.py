"""Overlapped pair: one micro-batch's forward and another's backward through a layer each, phase by phase.

Messages start where their phase stands and are waited for by the phase that needs them, so what stands between the two
hides them. `PAIR` is that order, for two layers with experts (DeepSeek-V3 report, section 3.2.1, and its published
profile): attention of the forward hides the dispatch of the backward's gradients, the experts' backward hides the
forward's dispatch, and so on, every message under compute. The order of the published trace's annotations was refused:
taken as start order it leaves the forward's combine exposed.

A block's first phase leaves its weight gradients to the next block's backward, which runs them behind the start of its
own combine (`LEFT_OVER`): without a forward beside it they hide that message, and with one it starts earlier.

Where ranks share sequences (`model.context_phases`) attention has a message of its own. The forward's gather starts
before the pair's first message, which the same queue carries, for attention reads it first; it hides under the queries'
projections, which are inside attn. The scatter of its gradients hides under attention's weight gradients; left over
are those of the keys.

What has no partner runs in the same order, alone: a dense block has no messages, one of two stages may have more
blocks, and the embedding, the head and the MTP module's projection stand outside the pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest

from fp8moe.layers.phase import Pass
from fp8moe.profile.spans import span

LEFT_OVER = ("W", "left over")  # weight gradients of the first phase of the block before
# (F forward | B backward | W weight gradients, phase); of W a block's first phase is left over for the next
PAIR = (
    ("F", "keys"),
    ("F", "gather"),
    ("B", "combine"),
    LEFT_OVER,
    ("F", "attn"),
    ("F", "dispatch"),
    ("B", "mlp"),
    ("B", "dispatch"),
    ("W", "mlp"),
    ("F", "mlp"),
    ("F", "combine"),
    ("B", "attn"),
    ("B", "gather"),
    ("W", "attn"),
    ("B", "keys"),
)
WeightGradients = tuple[tuple[str, Callable[[], None]], ...]  # of named phases
_PAIRED = frozenset(name for _, name in PAIR)


def run_forward(passes: Sequence[Pass]) -> None:
    """Run the forward of `passes`, first to last."""
    for one in passes:
        for phase in one.phases:
            _call("F", phase.name, phase.forward)


def run_backward(passes: Sequence[Pass]) -> None:
    """Run the backward of `passes`, last to first, without weight gradients."""
    for one in reversed(passes):
        for phase in reversed(one.phases):
            _call("B", phase.name, phase.backward)


def deferred_wgrads(passes: Sequence[Pass]) -> WeightGradients:
    """The weight gradients that the backward of `passes` leaves to do, last to first; they need the passes no more."""
    phases = [phase for one in reversed(passes) for phase in reversed(one.phases)]
    return tuple((phase.name, phase.wgrad) for phase in phases if phase.wgrad is not None)


def run_wgrads(wgrads: WeightGradients) -> None:
    """Run the weight gradients that a backward left to do."""
    for name, wgrad in wgrads:
        _call("W", name, wgrad)


def run_pair(forward: Sequence[Pass], backward: Sequence[Pass]) -> None:
    """Run the forward of one stage's passes and the whole backward of another's, layer beside layer, by `PAIR`.

    Either may be empty; a backward without a partner still hides its messages under its own weight gradients.
    """
    left_over: WeightGradients = ()
    for ahead, back in zip_longest(_layers(forward), _layers(tuple(reversed(backward))), fillvalue=((), None)):
        run_forward(ahead[0])
        for one in back[0]:
            run_wgrads(left_over)
            run_backward((one,))
            left_over = deferred_wgrads((one,))
        left_over = _run_layers(ahead[1], back[1], left_over)
    run_wgrads(left_over)


def _layers(passes: Sequence[Pass]) -> Iterator[tuple[tuple[Pass, ...], Pass | None]]:
    """Each block's pass, with the passes of other parts before it; None in place of a block after the last one."""
    before: list[Pass] = []
    for one in passes:
        if all(phase.name in _PAIRED for phase in one.phases):
            yield tuple(before), one
            before = []
        else:
            before.append(one)
    if before:
        yield tuple(before), None


def _run_layers(forward: Pass | None, backward: Pass | None, left_over: WeightGradients) -> WeightGradients:
    """Run two blocks by `PAIR`; `left_over` by the block before -> what this one leaves."""
    ahead = {} if forward is None else {phase.name: phase for phase in forward.phases}
    back = {} if backward is None else {phase.name: phase for phase in backward.phases}
    first = None if backward is None else backward.phases[0]
    for part, name in PAIR:
        if (part, name) == LEFT_OVER:
            run_wgrads(left_over)
        elif part == "F" and name in ahead:
            _call(part, name, ahead[name].forward)
        elif part == "B" and name in back:
            _call(part, name, back[name].backward)
        elif part == "W" and name in back and back[name] is not first:
            wgrad = back[name].wgrad
            assert wgrad is not None
            _call(part, name, wgrad)
    if first is None:
        return ()
    assert first.wgrad is not None
    return ((first.name, first.wgrad),)


def _call(part: str, name: str, phase: Callable[[], None]) -> None:
    with span(f"{part} {name}"):
        phase()
