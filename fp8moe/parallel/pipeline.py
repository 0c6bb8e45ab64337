"""Pipeline engine: runs one rank's list of actions, messages between ranks included.

The engine knows stages, micro-batches and the order of actions; what a stage computes comes as passes (`layers.phase`)
from the builder of the model. A micro-batch's passes on a stage live from its F to its B; what its W has left to do is
kept as deferred weight gradients. Whether a pair is overlapped or run one after the other changes no bit: both call the
same phases, and a parameter's gradients are added in the order of the actions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from torch import Tensor

from fp8moe.layers.phase import Pass, Phase
from fp8moe.parallel.links import Links
from fp8moe.parallel.overlap import WeightGradients, deferred_wgrads, run_backward, run_forward, run_pair, run_wgrads
from fp8moe.parallel.stream import leaving_sms
from fp8moe.profile.spans import span
from fp8moe.schedule.action import Action, Kind, Schedule

# (stage, micro-batch, a function that gives the stage's input, None for stage 0) -> the stage's passes, first to last
MakePasses = Callable[[int, int, Callable[[], Tensor] | None], Sequence[Pass]]


class PassObserver(Protocol):
    """Is told of passes by their stage and their place in the stage's list, on the thread that runs them."""

    def before_forward(self, stage: int, position: int) -> None:
        """The pass is about to read its weights."""

    def after_last_wgrad(self, stage: int, position: int) -> None:
        """The pass has added the last of its weight gradients in this run."""


class _Observed:
    """A pass that calls `before` ahead of its first phase's forward, and `after` behind that phase's weight gradient.

    Going back, the first phase is the last.
    """

    def __init__(self, one: Pass, before: Callable[[], None], after: Callable[[], None] | None) -> None:
        self._pass, self._before, self._after = one, before, after

    @property
    def phases(self) -> tuple[Phase, ...]:
        first, *others = self._pass.phases
        wgrad, after = first.wgrad, self._after
        if after is not None:
            assert wgrad is not None
            wgrad = partial(_in_turn, wgrad, after)
        return (first._replace(forward=partial(_in_turn, self._before, first.forward), wgrad=wgrad), *others)

    @property
    def output(self) -> Tensor:
        return self._pass.output

    @property
    def input_gradient(self) -> Tensor:
        return self._pass.input_gradient

    def backward_from(self, gradient: Callable[[], Tensor]) -> None:
        self._pass.backward_from(gradient)


def _in_turn(first: Callable[[], None], second: Callable[[], None]) -> None:
    first()
    second()


@dataclass
class Pipeline:
    """This rank's part of `schedule`; `rank` is its pipeline rank.

    make_passes  builds a stage's passes for a micro-batch
    empty        makes a tensor of the shape, dtype and device of the hidden states that ranks send each other
    overlap      whether FB pairs are interleaved and backwards hide messages under their own weight gradients
    sms          on a GPU, SMs for the GEMMs that run beside experts' messages, in pairs and outside (None: all)
    observer     is told when a pass reads its weights, and when their gradients are finished
    """

    schedule: Schedule
    rank: int
    links: Links
    make_passes: MakePasses
    empty: Callable[[], Tensor]
    overlap: bool = True
    sms: int | None = None
    observer: PassObserver | None = None
    _passes: dict[tuple[int, int], Sequence[Pass]] = field(default_factory=dict)
    _deferred: dict[tuple[int, int], WeightGradients] = field(default_factory=dict)
    _ready: dict[tuple[Kind, int, int], Callable[[], Tensor]] = field(default_factory=dict)  # by `Action.message`

    def __post_init__(self) -> None:
        self._has_backward = self.schedule.has_backward
        self._last_wgrads = self.schedule.last_wgrads(self.rank)

    def run(self) -> None:
        """Do every action of this rank, in order. Collective over the pipeline."""
        with leaving_sms(self.sms):
            for action in self.schedule.actions[self.rank]:
                if action.kind.is_message:
                    self._message(action)
                else:
                    with span(str(action)):
                        self._compute(action)
            self.links.finish()
        assert not (self._passes or self._deferred or self._ready), "the schedule left work behind"

    def _message(self, action: Action) -> None:
        assert action.peer is not None
        if action.kind.is_send:
            self.links.send(self._ready.pop(action.message)(), action.peer, str(action))
        else:
            self._ready[action.message] = self.links.receive(self.empty(), action.peer, str(action)).wait

    def _compute(self, action: Action) -> None:
        match action.kind:
            case Kind.F:
                run_forward(self._start_forward(action))
                self._end_forward(action)
            case Kind.B:
                run_backward(self._start_backward(action))
                self._end_backward(action)
            case Kind.W:
                run_wgrads(self._deferred.pop((action.stage, action.microbatch)))
            case Kind.BW:
                self._pair(None, action)
            case Kind.FB:
                self._pair(action, action.paired)

    def _pair(self, forward: Action | None, backward: Action | None) -> None:
        assert backward is not None
        ahead = () if forward is None else self._start_forward(forward)
        back = self._start_backward(backward)
        if self.overlap:
            run_pair(ahead, back)
        else:
            run_forward(ahead)
            run_backward(back)
            run_wgrads(deferred_wgrads(back))
        if forward is not None:
            self._end_forward(forward)
        self._end_backward(backward)
        self._deferred.pop((backward.stage, backward.microbatch))

    def _start_forward(self, action: Action) -> Sequence[Pass]:
        """The passes of a new micro-batch; the first will ask for the output of the stage before."""
        message = (Kind.RECV_F, action.stage, action.microbatch)
        source = None if action.stage == 0 else partial(self._take, message)
        passes = self._observed(action, self.make_passes(action.stage, action.microbatch, source))
        self._passes[action.stage, action.microbatch] = passes
        return passes

    def _observed(self, action: Action, passes: Sequence[Pass]) -> Sequence[Pass]:
        observer, stage = self.observer, action.stage
        if observer is None:
            return passes
        is_last = self._has_backward and self._last_wgrads[stage][0] == action.microbatch
        return [
            _Observed(
                one,
                partial(observer.before_forward, stage, i),
                partial(observer.after_last_wgrad, stage, i) if is_last else None,
            )
            for i, one in enumerate(passes)
        ]

    def _start_backward(self, action: Action) -> Sequence[Pass]:
        """The passes of a backward; the last will ask for the gradient from the next stage, or begins with the loss."""
        passes = self._passes[action.stage, action.microbatch]
        if action.stage < self.schedule.num_stages - 1:
            passes[-1].backward_from(partial(self._take, (Kind.RECV_B, action.stage, action.microbatch)))
        return passes

    def _take(self, message: tuple[Kind, int, int]) -> Tensor:
        return self._ready.pop(message)()

    def _end_forward(self, action: Action) -> None:
        """Keep the output for the SEND, or for the next stage on this rank."""
        if action.stage < self.schedule.num_stages - 1:
            # Read only when it is needed: what runs until then hides the last combine.
            last = self._passes[action.stage, action.microbatch][-1]
            self._ready[Kind.RECV_F, action.stage + 1, action.microbatch] = lambda: last.output
        if not self._has_backward:
            del self._passes[action.stage, action.microbatch]

    def _end_backward(self, action: Action) -> None:
        """Keep the input's gradient likewise, and the weight gradients for W; drop the passes."""
        passes = self._passes.pop((action.stage, action.microbatch))
        if action.stage > 0:
            gradient = passes[0].input_gradient
            self._ready[Kind.RECV_B, action.stage - 1, action.microbatch] = lambda: gradient
        self._deferred[action.stage, action.microbatch] = deferred_wgrads(passes)
