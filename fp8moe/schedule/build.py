"""Pipeline schedules by name: (ranks, micro-batches) -> per-rank lists of actions; pure functions.

    1f1b       one forward, one backward (PipeDream-flush): bubble (PP-1)(F+B), holds PP micro-batches
    zb1p       1F1B with the weight gradients deferred (ZB-H1, Qi et al. 2024): (PP-1)(F+B-2W), holds PP
    dualpipe   bidirectional, every stage on two ranks: (PP/2-1)(F&B+B-3W), holds PP+1, parameters twice
    dualpipev  its cut in half: 2 PP stages on PP ranks, (PP-1)(F&B+B-3W) in the time of its smaller stages

F, B, W and F&B are the times of one stage: forward, whole backward, the weight gradients' part of it, and a forward
overlapped with a backward. Legal sizes are `legal(...)`; the actions' meaning is in action.py.
"""

from collections.abc import Callable
from dataclasses import replace

from fp8moe.errors import ConfigError
from fp8moe.schedule.action import Action, Kind, Schedule, with_messages
from fp8moe.schedule.dualpipe import dualpipe, dualpipev


def one_forward_one_backward(num_ranks: int, num_microbatches: int) -> Schedule:
    """1F1B: stage r on rank r; fill, alternate, drain."""
    lists = []
    for rank in range(num_ranks):
        ahead = min(num_ranks - 1 - rank, num_microbatches)
        fill = [Action(Kind.F, rank, i, phase=1) for i in range(ahead)]
        steady = [
            Action(kind, rank, i + offset, phase=2)
            for i in range(num_microbatches - ahead)
            for kind, offset in ((Kind.F, ahead), (Kind.BW, 0))
        ]
        drain = [Action(Kind.BW, rank, i, phase=3) for i in range(num_microbatches - ahead, num_microbatches)]
        lists.append((*fill, *steady, *drain))
    return Schedule(
        "1f1b", num_microbatches, tuple(lists), (tuple(range(num_ranks)),), ("F: fill", "F BW: steady", "BW: drain")
    )


def zero_bubble_1p(num_ranks: int, num_microbatches: int) -> Schedule:
    """ZB1P: 1F1B's order, its backwards split; a W runs as soon as waiting longer would hold more than 1F1B does.

    Rank r has PP-1-r forwards ahead of its backwards, so it may owe r weight gradients and still hold no more than PP
    micro-batches; what it owes at the end fills the waits of the drain.
    """
    phases = ("F: fill", "F B W: steady", "B W: drain", "W: what is left")
    lists = []
    for rank in range(num_ranks):
        ahead = min(num_ranks - 1 - rank, num_microbatches)
        steady = num_microbatches - ahead
        actions = [Action(Kind.F, rank, i, phase=1) for i in range(ahead)]
        done = 0
        for i in range(steady):
            actions += [Action(Kind.F, rank, ahead + i, phase=2), Action(Kind.B, rank, i, phase=2)]
            if ahead + i + 1 - done == num_ranks:
                actions.append(Action(Kind.W, rank, done, phase=2))
                done += 1
        for i in range(steady, num_microbatches):
            actions += [Action(Kind.B, rank, i, phase=3), Action(Kind.W, rank, done, phase=3)]
            done += 1
        actions += [Action(Kind.W, rank, i, phase=4) for i in range(done, num_microbatches)]
        lists.append(tuple(actions))
    return Schedule("zb1p", num_microbatches, tuple(lists), (tuple(range(num_ranks)),), phases)


SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {
    "1f1b": one_forward_one_backward,
    "zb1p": zero_bubble_1p,
    "dualpipe": dualpipe,
    "dualpipev": dualpipev,
}


def num_stages(name: str, num_ranks: int) -> int:
    """Stages that the model is cut into: two a rank under DualPipeV, otherwise one (DualPipe holds each twice)."""
    return 2 * num_ranks if name == "dualpipev" else num_ranks


FOLDED = ("dualpipe", "dualpipev")  # stages r and num_stages - 1 - r are on one rank


def microbatches(name: str, num_ranks: int) -> tuple[int, int]:
    """(least, multiple): the numbers of micro-batches that are legal. Raises ConfigError for a number of ranks."""
    least, multiple = (2 * num_ranks, 2 if name == "dualpipe" else 1) if name in FOLDED else (1, 1)
    legal(name, num_ranks, least)
    return least, multiple


def legal(name: str, num_ranks: int, num_microbatches: int) -> None:
    """Raise ConfigError, one sentence that names the nearest legal choice, unless the schedule exists so."""
    if name not in SCHEDULES:
        raise ConfigError(f"schedule={name} is unknown: use {', '.join(SCHEDULES)}")
    if num_ranks < 1:
        least = 2 if name == "dualpipe" else 1
        raise ConfigError(f"pp={num_ranks} pipeline ranks are too few for {name}: use at least {least}")
    if name == "dualpipe" and num_ranks % 2:
        nearest = f"{num_ranks - 1} or {num_ranks + 1}" if num_ranks > 1 else "2"
        raise ConfigError(f"dualpipe needs an even number of pipeline ranks, and pp={num_ranks} is odd: use {nearest}")
    if name in ("1f1b", "zb1p"):
        if num_microbatches < 1:
            raise ConfigError(f"{name} needs at least 1 micro-batch, not {num_microbatches}: use 1 or more")
        return
    least = 2 * num_ranks
    if num_microbatches < least:
        raise ConfigError(
            f"{name} on {num_ranks} ranks needs at least {least} micro-batches (2 a rank), and {num_microbatches} are "
            f"too few: use {least}"
        )
    if name == "dualpipe" and num_microbatches % 2:
        raise ConfigError(
            f"dualpipe needs an even number of micro-batches, at least {least} on {num_ranks} ranks, and "
            f"{num_microbatches} is odd: use {num_microbatches - 1} or {num_microbatches + 1}"
        )


def build_schedule(name: str, num_ranks: int, num_microbatches: int) -> Schedule:
    """The schedule `name`, messages included.

    Errors: ConfigError when the schedule does not exist at these sizes (see `legal`).
    """
    legal(name, num_ranks, num_microbatches)
    return with_messages(SCHEDULES[name](num_ranks, num_microbatches))


def forwards(schedule: Schedule, num_microbatches: int) -> Schedule:
    """Forwards only, of any number of micro-batches, on the ranks of `schedule`: what a validation runs.

    Every rank takes its stages in the order in which a full pipeline would reach them.
    """
    blank = replace(schedule, name=f"{schedule.name}, forwards", num_microbatches=num_microbatches, phases=("F",))
    lists: list[list[tuple[int, Action]]] = [[] for _ in schedule.actions]
    for direction, ranks in enumerate(schedule.placement):
        travelling = [i for i in range(num_microbatches) if blank.direction_of(i) == direction]
        for turn, microbatch in enumerate(travelling):
            for stage, rank in enumerate(ranks):
                lists[rank].append((turn + stage, Action(Kind.F, stage, microbatch, direction, phase=1)))
    ordered = (sorted(actions, key=lambda entry: entry[0]) for actions in lists)
    return with_messages(replace(blank, actions=tuple(tuple(action for _, action in actions) for actions in ordered)))
