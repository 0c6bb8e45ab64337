"""DeepSeek-V3's published training step, and the times of a chunk that it implies.

The figures are seconds of one step of 15,360 sequences of 4,096 tokens on 2,048 H800 (PP16 x EP64, DualPipe, so 120
micro-batches of one sequence a pipeline), from Table 4 of the ISCA 2025 hardware paper: forward chunks, backward
chunks and weight-gradient chunks that run alone, overlapped pairs, bubble, optimizer.

Which rank was timed is not said. The first rank is assumed: it runs 23 forwards, 15 split and 8 whole backwards, 15
weight gradients and 97 pairs, and with these counts W is 0.22 of a pair, which is what the published kernel times of a
layer allow (FP8 GEMM 57.5 % of the time, a third of it weight gradients). With the middle rank's counts (17, 8 and 9,
8, 103) W would be 0.44 of a pair, more than all of its weight-gradient GEMMs.
"""

from collections import Counter

from fp8moe.parallel.action import Kind, Schedule
from fp8moe.parallel.schedule import build_schedule
from fp8moe.parallel.simulate import Costs, Timeline

NUM_RANKS, NUM_MICROBATCHES, RANK = 16, 120, 0
STEP = 19.926
PUBLISHED = {"1F": 1.13, "bubble": 2.06, "1B": 1.99, "1W": 0.48, "1F1B": 13.95, "optimizer": 0.29}


def published_costs(rank: int = RANK) -> Costs:
    """Seconds of a chunk: each published total over the number of such chunks that `rank` runs.

    1B holds split and whole backwards: with b the input part, 1B = n_B b + n_BW (b + W).
    """
    actions = build_schedule("dualpipe", NUM_RANKS, NUM_MICROBATCHES).actions[rank]
    count = Counter(action.kind for action in actions)
    weight = PUBLISHED["1W"] / count[Kind.W]
    input_part = (PUBLISHED["1B"] - count[Kind.BW] * weight) / (count[Kind.B] + count[Kind.BW])
    return Costs(
        forward=PUBLISHED["1F"] / count[Kind.F],
        backward=input_part + weight,
        weight=weight,
        overlapped=PUBLISHED["1F1B"] / count[Kind.FB],
    )


def is_published(schedule: Schedule) -> bool:
    """Whether this is the schedule of the published step."""
    return (schedule.name, schedule.num_ranks, schedule.num_microbatches) == ("dualpipe", NUM_RANKS, NUM_MICROBATCHES)


def beside_published(timeline: Timeline, rank: int = RANK) -> dict[str, tuple[float, float]]:
    """phase -> (simulated, published) seconds on `rank`, the whole step last."""
    spent = timeline.time_by_kind(rank)
    simulated = {
        "1F": spent[Kind.F],
        "bubble": timeline.bubble[rank],
        "1B": spent[Kind.B] + spent[Kind.BW],
        "1W": spent[Kind.W],
        "1F1B": spent[Kind.FB],
        "optimizer": PUBLISHED["optimizer"],
    }
    rows = {phase: (float(simulated[phase]), seconds) for phase, seconds in PUBLISHED.items()}
    return {**rows, "step": (float(timeline.makespan) + PUBLISHED["optimizer"], STEP)}
