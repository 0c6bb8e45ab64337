"""The overlapped pair: one micro-batch's forward and another's backward through a layer each, phase by phase.

Messages start where their phase stands and are waited for by the phase that needs them, so what stands between the two
hides them. `PAIR` is that order, for two layers with experts (DeepSeek-V3 report, section 3.2.1, and its published
profile): attention of the forward hides the gradients' way to the experts, the experts' backward hides the forward's
dispatch, and so on, every message under somebody's compute. The order of the published trace's annotations was refused:
taken as start order it leaves the forward's combine exposed.

What has no partner runs in the same order, alone: a dense block has no messages, one of two stages may have more
blocks, and the embedding, the head and the MTP module's projection stand outside the pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest

from fp8moe.layers.phase import Pass
from fp8moe.profile.spans import span

# (F forward | B backward | W weight gradients, phase)
PAIR = (
    ("B", "combine"),
    ("F", "attn"),
    ("F", "dispatch"),
    ("B", "mlp"),
    ("B", "dispatch"),
    ("W", "mlp"),
    ("F", "mlp"),
    ("F", "combine"),
    ("B", "attn"),
    ("W", "attn"),
)
WeightGradients = tuple[tuple[str, Callable[[], None]], ...]  # of named phases
_PAIRED = frozenset(name for _, name in PAIR)


def run_forward(runs: Sequence[Pass]) -> None:
    """The forward of `runs`, first to last."""
    for run in runs:
        for phase in run.phases:
            _call("F", phase.name, phase.forward)


def run_backward(runs: Sequence[Pass]) -> None:
    """The backward of `runs`, last to first, without weight gradients."""
    for run in reversed(runs):
        for phase in reversed(run.phases):
            _call("B", phase.name, phase.backward)


def late_wgrads(runs: Sequence[Pass]) -> WeightGradients:
    """What `runs` leave to do once their backward is done, last to first; it needs the runs no more."""
    phases = [phase for run in reversed(runs) for phase in reversed(run.phases)]
    return tuple((phase.name, phase.wgrad) for phase in phases if phase.wgrad is not None)


def run_wgrads(late: WeightGradients) -> None:
    """The weight gradients that a backward left."""
    for name, wgrad in late:
        _call("W", name, wgrad)


def run_pair(forward: Sequence[Pass], backward: Sequence[Pass]) -> None:
    """The forward of one stage's runs and the whole backward of another's, layer beside layer in the order of `PAIR`.

    Either may be empty; a lone backward still hides its messages under its own weight gradients.
    """
    for ahead, back in zip_longest(_layers(forward), _layers(tuple(reversed(backward))), fillvalue=((), None)):
        run_forward(ahead[0])
        for run in back[0]:
            run_backward((run,))
            run_wgrads(late_wgrads((run,)))
        _run_layers(ahead[1], back[1])


def _layers(runs: Sequence[Pass]) -> Iterator[tuple[tuple[Pass, ...], Pass | None]]:
    """Each block with the runs before it that are none; None in place of a block for those behind the last."""
    before: list[Pass] = []
    for run in runs:
        if all(phase.name in _PAIRED for phase in run.phases):
            yield tuple(before), run
            before = []
        else:
            before.append(run)
    if before:
        yield tuple(before), None


def _run_layers(forward: Pass | None, backward: Pass | None) -> None:
    ahead = {} if forward is None else {phase.name: phase for phase in forward.phases}
    back = {} if backward is None else {phase.name: phase for phase in backward.phases}
    for way, name in PAIR:
        if way == "F" and name in ahead:
            _call(way, name, ahead[name].forward)
        elif way == "B" and name in back:
            _call(way, name, back[name].backward)
        elif way == "W" and name in back:
            wgrad = back[name].wgrad
            assert wgrad is not None
            _call(way, name, wgrad)


def _call(way: str, name: str, phase: Callable[[], None]) -> None:
    with span(f"{way} {name}"):
        phase()
