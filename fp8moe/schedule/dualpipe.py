"""DualPipe and DualPipeV: one rank's list in eight phases (DeepSeek-V3 technical report, section 3.2.1).

Every rank holds two chunks of the model, 0 and 1, and its forwards of one overlap its backwards of the other. In
DualPipe rank r holds stages r and PP-1-r and micro-batches enter from both ends: for direction 0 its chunk in the first
half of the ranks is chunk 0, for direction 1 the mirror image, so ranks r and PP-1-r run the same list. DualPipeV is
that list cut at the fold (Sea AI Lab, 2025): rank r of R holds stages r and 2R-1-r, and a micro-batch that reaches the
last rank turns there. One copy of the parameters, half as many ranks for as many stages.

The list, for a rank at `depth` (0 at the ends where micro-batches enter, half - 1 at the fold) and m micro-batches a
chunk. Bubble: (PP/2-1)(F&B + B - 3W), PP the number of stages, B the whole backward; held micro-batches: at most PP+1.

Splitting every backward was refused. It would start some neighbours earlier, and a pair that carries its weight
gradients hides more messages than one that does not; B and W stand alone only where a neighbour is waiting (phase 3)
or the weight gradients fill the drain (phases 6 to 8).
"""

from collections import deque

from fp8moe.schedule.action import Action, Kind, Schedule

PHASES = (
    "F0: fill, chunk 0 only",
    "F0 F1: fill, both chunks",
    "B1 W1 F1: first backwards, split so that the next rank starts early",
    "F0&B1 F1&B0: the main phase, every forward overlaps a backward",
    "B1 F1&B0: chunk 0 has no forwards left",
    "B1 B0: drain; the second half leaves its weight gradients for later",
    "W B0: drain, weight gradients fill the waits",
    "W: the weight gradients that are left",
)


class _List:
    """Builds one rank's actions: knows which micro-batch is next for each chunk, and which W is owed."""

    def __init__(self, stages: tuple[int, int], directions: tuple[int, int], first: tuple[int, int]) -> None:
        self.stages, self.directions = stages, directions
        self.next_forward, self.next_backward = list(first), list(first)
        self.owed: deque[Action] = deque()
        self.actions: list[Action] = []
        self.phase = 0

    def _action(self, kind: Kind, chunk: int, microbatch: int, paired: Action | None = None) -> Action:
        return Action(kind, self.stages[chunk], microbatch, self.directions[chunk], paired, phase=self.phase)

    def _take_backward(self, kind: Kind, chunk: int) -> Action:
        self.next_backward[chunk] += 1
        return self._action(kind, chunk, self.next_backward[chunk] - 1)

    def forward(self, chunk: int, paired: Action | None = None) -> None:
        kind = Kind.F if paired is None else Kind.FB
        self.actions.append(self._action(kind, chunk, self.next_forward[chunk], paired))
        self.next_forward[chunk] += 1

    def backward(self, chunk: int) -> None:
        self.actions.append(self._take_backward(Kind.BW, chunk))

    def input_backward(self, chunk: int) -> None:
        microbatch = self.next_backward[chunk]
        self.actions.append(self._take_backward(Kind.B, chunk))
        self.owed.append(self._action(Kind.W, chunk, microbatch))

    def weight(self) -> None:
        owed = self.owed.popleft()
        self.actions.append(Action(Kind.W, owed.stage, owed.microbatch, owed.direction, phase=self.phase))

    def overlapped(self, forward_chunk: int, backward_chunk: int) -> None:
        self.forward(forward_chunk, self._take_backward(Kind.BW, backward_chunk))


def _eight_phases(out: _List, depth: int, half: int, m: int) -> tuple[Action, ...]:
    """Fill `out` for a rank `depth` steps from its entrance, `half` such steps in all, m micro-batches a chunk."""
    to_fold = half - 1 - depth  # ranks between this one and the fold
    at_fold = to_fold == 0

    out.phase = 1  # F0
    for _ in range(2 * to_fold):
        out.forward(0)

    out.phase = 2  # F0 F1
    for _ in range(depth + 1):
        out.forward(0)
        out.forward(1)

    out.phase = 3  # B1 W1 F1
    for _ in range(to_fold):
        out.input_backward(1)
        out.weight()
        out.forward(1)

    out.phase = 4  # F0&B1 F1&B0
    for i in range(m - 2 * half + depth + 1):
        if i == 0 and at_fold:
            # The first B1 of all: its own F1 has only just run, and nothing is in flight that a pair could hide.
            out.forward(0)
            out.backward(1)
        else:
            out.overlapped(0, 1)
        out.overlapped(1, 0)

    out.phase = 5  # B1 F1&B0
    for _ in range(to_fold):
        out.backward(1)
        out.overlapped(1, 0)

    out.phase = 6  # B1 B0, the second half split
    for i in range(2 * (depth + 1)):
        chunk = 1 - i % 2
        if i < depth + 1:
            out.backward(chunk)
        else:
            out.input_backward(chunk)

    out.phase = 7  # W B0
    for _ in range(to_fold):
        out.weight()
        out.input_backward(0)

    out.phase = 8  # W
    for _ in range(depth + 1):
        out.weight()

    assert not out.owed
    return tuple(out.actions)


def dualpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """Bidirectional: num_ranks (even) stages, each on two ranks; num_microbatches even and at least 2 * num_ranks."""
    half, m = num_ranks // 2, num_microbatches // 2
    lists = []
    for rank in range(num_ranks):
        depth = min(rank, num_ranks - 1 - rank)
        near = 0 if rank < half else 1  # the direction that enters from this rank's side
        out = _List((depth, num_ranks - 1 - depth), (near, 1 - near), (near * m, (1 - near) * m))
        lists.append(_eight_phases(out, depth, half, m))
    up = tuple(range(num_ranks))
    return Schedule("dualpipe", num_microbatches, tuple(lists), (up, up[::-1]), PHASES)


def dualpipev(num_ranks: int, num_microbatches: int) -> Schedule:
    """The V: 2 * num_ranks stages, rank r holds r and 2 * num_ranks - 1 - r; at least 2 * num_ranks micro-batches."""
    lists = [
        _eight_phases(_List((rank, 2 * num_ranks - 1 - rank), (0, 0), (0, 0)), rank, num_ranks, num_microbatches)
        for rank in range(num_ranks)
    ]
    down = tuple(range(num_ranks))
    return Schedule("dualpipev", num_microbatches, tuple(lists), ((*down, *reversed(down)),), PHASES)
