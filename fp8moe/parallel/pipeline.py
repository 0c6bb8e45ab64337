"""Run a schedule: one rank's list of actions, with the messages between ranks that it says.

The pipeline knows stages, micro-batches and the order of things; what a stage computes comes as runs (`layers.phase`)
from whoever builds the model. A micro-batch's runs on a stage live from its F to its B; what its W has left to do lives
on in the weight gradients that wait. Whether a pair is overlapped or run one after the other changes no bit: both call
the same phases, and a parameter's gradients are added in the order of the actions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from fp8moe.kernels.sms import limited_sms
from fp8moe.layers.phase import Pass
from fp8moe.parallel.links import Links
from fp8moe.parallel.overlap import WeightGradients, late_wgrads, run_backward, run_forward, run_pair, run_wgrads
from fp8moe.profile.spans import span
from fp8moe.schedule.action import Action, Kind, Schedule

# (stage, micro-batch, what gives the stage's input, None for the first) -> the stage's runs, first to last
MakePasses = Callable[[int, int, Callable[[], Tensor] | None], Sequence[Pass]]


@dataclass
class Pipeline:
    """This rank's part of `schedule`; `rank` is its pipeline rank.

    make_passes   builds a stage's runs for a micro-batch
    empty       a new tensor of the shape, dtype and device of the hidden states that ranks send each other
    overlap     whether FB pairs are interleaved and backwards hide messages under their own weight gradients
    sms         on a GPU, SMs for a pair's GEMMs: its messages run beside them (None: all)
    """

    schedule: Schedule
    rank: int
    links: Links
    make_passes: MakePasses
    empty: Callable[[], Tensor]
    overlap: bool = True
    sms: int | None = None
    _runs: dict[tuple[int, int], Sequence[Pass]] = field(default_factory=dict)
    _late: dict[tuple[int, int], WeightGradients] = field(default_factory=dict)
    _ready: dict[tuple[Kind, int, int], Callable[[], Tensor]] = field(default_factory=dict)  # by message: action.py

    def __post_init__(self) -> None:
        self._goes_back = self.schedule.goes_back

    def run(self) -> None:
        """Do every action of this rank, in order. Collective over the pipeline."""
        for action in self.schedule.actions[self.rank]:
            if action.kind.is_message:
                self._message(action)
            else:
                with span(str(action)):
                    self._compute(action)
        self.links.finish()
        assert not (self._runs or self._late or self._ready), "the schedule left work behind"

    def _message(self, action: Action) -> None:
        assert action.peer is not None
        if action.kind.is_send:
            self.links.send(self._ready.pop(action.message)(), action.peer, str(action))
        else:
            self._ready[action.message] = self.links.receive(self.empty(), action.peer, str(action)).wait

    def _compute(self, action: Action) -> None:
        match action.kind:
            case Kind.F:
                run_forward(self._begin(action))
                self._end_forward(action)
            case Kind.B:
                run_backward(self._turn(action))
                self._end_backward(action)
            case Kind.W:
                run_wgrads(self._late.pop((action.stage, action.microbatch)))
            case Kind.BW:
                self._pair(None, action)
            case Kind.FB:
                self._pair(action, action.paired)

    def _pair(self, forward: Action | None, backward: Action | None) -> None:
        assert backward is not None
        ahead = () if forward is None else self._begin(forward)
        back = self._turn(backward)
        if self.overlap:
            with limited_sms(self.sms):
                run_pair(ahead, back)
        else:
            run_forward(ahead)
            run_backward(back)
            run_wgrads(late_wgrads(back))
        if forward is not None:
            self._end_forward(forward)
        self._end_backward(backward)
        self._late.pop((backward.stage, backward.microbatch))

    def _begin(self, action: Action) -> Sequence[Pass]:
        """The runs of a new micro-batch; the first will ask for what the stage before has made."""
        message = (Kind.RECV_F, action.stage, action.microbatch)
        source = None if action.stage == 0 else partial(self._take, message)
        runs = self.make_passes(action.stage, action.microbatch, source)
        self._runs[action.stage, action.microbatch] = runs
        return runs

    def _turn(self, action: Action) -> Sequence[Pass]:
        """The runs that go back; the last will ask for the gradient from the stage behind, or begins with the loss."""
        runs = self._runs[action.stage, action.microbatch]
        if action.stage < self.schedule.num_stages - 1:
            runs[-1].backward_from(partial(self._take, (Kind.RECV_B, action.stage, action.microbatch)))
        return runs

    def _take(self, message: tuple[Kind, int, int]) -> Tensor:
        return self._ready.pop(message)()

    def _end_forward(self, action: Action) -> None:
        """Leave the output where the SEND, or the next stage on this rank, finds it."""
        runs = self._runs[action.stage, action.microbatch]
        if action.stage < self.schedule.num_stages - 1:
            last = runs[-1]  # asked when the output is needed: what runs until then hides the last combine
            self._ready[Kind.RECV_F, action.stage + 1, action.microbatch] = lambda: last.output
        if not self._goes_back:
            del self._runs[action.stage, action.microbatch]

    def _end_backward(self, action: Action) -> None:
        """Leave the input's gradient likewise, keep what W has to do, and let the runs go."""
        runs = self._runs.pop((action.stage, action.microbatch))
        if action.stage > 0:
            gradient = runs[0].input_gradient
            self._ready[Kind.RECV_B, action.stage - 1, action.microbatch] = lambda: gradient
        self._late[action.stage, action.microbatch] = late_wgrads(runs)
