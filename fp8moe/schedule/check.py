"""Schedule checker: lists what is wrong with a schedule; empty when it does a step's work, in order, within memory.

What is proven, of the lists as they would be executed:
  work      every stage runs F, B and W once for every micro-batch, on the rank that holds it for that direction,
            micro-batches in ascending order for each stage and part; an FB pairs a forward with the whole backward of
            another chunk or micro-batch
  messages  each rank sends what its computations make for another, and posts what they need from another, once each
  progress  B comes after its F, W after its B, a SEND after what it carries; every link receives in the order in which
            it sends; the ranks all reach their ends: no circle of waits
  memory    no rank ever holds more than PP+1 stage-activations, PP the number of stages

Timing plays no part: whether lists can run to their end depends on their order only, so one simulation with any costs
decides it. Checking the builder's arithmetic instead of its output was refused: the engine runs any lists it is given.
"""

from collections import Counter
from collections.abc import Iterator

from fp8moe.schedule.action import Action, Kind, Schedule, ScheduleError, receives, sends
from fp8moe.schedule.simulate import peak_held, simulate


def check(schedule: Schedule) -> None:
    """Raise ScheduleError with the first violation and how many there are."""
    found = violations(schedule)
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise ScheduleError(f"{schedule.name}: {found[0]}{more}")


def violations(schedule: Schedule) -> list[str]:
    """Everything that is wrong with `schedule`, a sentence each; [] for one that can be run."""
    # Each step reads the lists as the one before it has proven them.
    found = list(_range(schedule))
    found = found or list(_work(schedule))
    found = found or [*_messages(schedule), *_memory(schedule)]
    if not found:
        try:
            simulate(schedule)
        except ScheduleError as stuck:
            found.append(str(stuck))
    return found


def _range(schedule: Schedule) -> Iterator[str]:
    sizes = f"{schedule.num_stages} stages, {schedule.num_microbatches} micro-batches and {schedule.num_ranks} ranks"
    for rank, actions in enumerate(schedule.actions):
        for action in actions:
            for one in filter(None, (action, action.paired)):
                if not (
                    0 <= one.stage < schedule.num_stages
                    and 0 <= one.microbatch < schedule.num_microbatches
                    and one.direction == schedule.direction_of(one.microbatch)
                    and (one.peer is not None) == one.kind.is_message
                    and (one.peer is None or 0 <= one.peer < schedule.num_ranks)
                ):
                    yield f"rank {rank} has {action} in direction {one.direction}: there are {sizes}"


def _work(schedule: Schedule) -> Iterator[str]:
    done: Counter[tuple[Kind, int, int]] = Counter()
    for rank, actions in enumerate(schedule.actions):
        latest: dict[tuple[Kind, int, int], int] = {}
        for action in actions:
            yield from _pairing(rank, action)
            for kind, stage, microbatch, direction in action.parts():
                name = f"{kind} of stage {stage}, micro-batch {microbatch}"
                if schedule.placement[direction][stage] != rank:
                    yield f"rank {rank} runs {name}, which rank {schedule.placement[direction][stage]} holds"
                if microbatch < latest.get((kind, stage, direction), -1):
                    yield f"rank {rank} runs {name} after micro-batch {latest[kind, stage, direction]}"
                latest[kind, stage, direction] = microbatch
                done[kind, stage, microbatch] += 1
    for kind in (Kind.F, Kind.B, Kind.W):
        for stage in range(schedule.num_stages):
            for microbatch in range(schedule.num_microbatches):
                times = done[kind, stage, microbatch]
                if times != 1:
                    yield f"{kind} of stage {stage}, micro-batch {microbatch} runs {times} times"


def _pairing(rank: int, action: Action) -> Iterator[str]:
    if (action.kind is Kind.FB) != (action.paired is not None):
        yield f"rank {rank} runs {action}: an FB, and nothing else, has a paired backward"
    elif action.paired is not None:
        if action.paired.kind is not Kind.BW:
            yield f"rank {rank} runs {action}: the second of a pair is a BW"
        elif (action.paired.stage, action.paired.microbatch) == (action.stage, action.microbatch):
            yield f"rank {rank} runs {action}: a forward can't overlap its own backward"


def _messages(schedule: Schedule) -> Iterator[str]:
    """Each rank's messages are those that its computations make and need, once each; simulate proves their order."""
    for rank, actions in enumerate(schedule.actions):
        wanted = Counter(send for action in actions for send in sends(schedule, action))
        wanted.update(receive for action in actions for receive in receives(schedule, action))
        found = Counter(action for action in actions if action.kind.is_message)
        for action in found - wanted:
            yield f"rank {rank} has {action} {found[action]} times, and its computations call for {wanted[action]}"
        for action in wanted - found:
            yield f"rank {rank} lacks {action}, which its computations call for"


def _memory(schedule: Schedule) -> Iterator[str]:
    most = schedule.num_stages + 1
    for rank, peak in enumerate(peak_held(schedule)):
        if peak > most:
            yield f"rank {rank} holds {peak} stage-activations, more than {schedule.num_stages} stages + 1"
