"""Partition of layers into pipeline stages, balanced by cost or as a layout says.

Cost is forward arithmetic a token, counted as in flops.py: a dense and a mixture block by their active parameters and
attention's products, the output head by its GEMM, the MTP module by its block, its projection and a second pass of the
head. The embedding does no arithmetic; it moves bytes, and a byte is weighed as the 300 FLOP that an H100 does in
BF16 while memory delivers one. Communication is left out: an overlapped pair hides it.

What has to be even is the work of a RANK. Under DualPipe and DualPipeV rank r holds stages r and PP-1-r, and the
steady state runs at the pace of the heaviest such pair; balancing stages one by one was refused because it leaves the
head's stage paired with a full one. Blocks are not split and stages are contiguous, so for 61 blocks, a head and an MTP
module on 16 ranks some unevenness always stays; `imbalance` says how much.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

from fp8moe.errors import ConfigError
from fp8moe.model.config import ModelConfig
from fp8moe.model.flops import block_parameters

FLOP_PER_BYTE = 300.0  # 989 TFLOPS of BF16 over 3.35 TB/s


@dataclass(frozen=True)
class Stage:
    """One pipeline stage: blocks `layers` of the model, and the ends of the model if they are here.

    The MTP module (block number num_layers) goes with the head that it shares.
    """

    index: int
    layers: range
    embedding: bool
    head: bool
    mtp: bool

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def __str__(self) -> str:
        blocks = f"block {self.layers[0]}" if len(self.layers) == 1 else f"blocks {self.layers[0]}-{self.layers[-1]}"
        ends = [name for name, here in (("head", self.head), ("MTP", self.mtp)) if here]
        return " + ".join([*(["embedding"] if self.embedding else []), blocks, *ends])


def block_cost(config: ModelConfig, layer: int, seq_len: int) -> float:
    """Forward FLOPs a token of block number `layer`."""
    return 2.0 * block_parameters(config, layer, active=True) + config.attention.core_flops(
        seq_len, causal=True, layer=layer
    )


def embedding_cost(config: ModelConfig) -> float:
    """A row read and written in BF16, in FLOPs of the same time."""
    return 2 * 2 * config.dim * FLOP_PER_BYTE


def head_cost(config: ModelConfig) -> float:
    """Forward FLOPs a token of the output head."""
    return 2.0 * config.vocab_size * config.dim


def mtp_cost(config: ModelConfig, seq_len: int) -> float:
    """The MTP module: projection of two states to one, a block, the embedding and the head once more; 0 without it."""
    if not config.mtp_depth:
        return 0.0
    block = block_cost(config, config.num_layers, seq_len)
    return block + 2.0 * 2 * config.dim**2 + embedding_cost(config) + head_cost(config)


def stage_cost(config: ModelConfig, stage: Stage, seq_len: int) -> float:
    """Forward FLOPs a token of a whole stage."""
    return (
        sum(block_cost(config, layer, seq_len) for layer in stage.layers)
        + stage.embedding * embedding_cost(config)
        + stage.head * head_cost(config)
        + stage.mtp * mtp_cost(config, seq_len)
    )


def relative_costs(config: ModelConfig, stages: tuple[Stage, ...], seq_len: int) -> tuple[float, ...]:
    """Each stage's cost over the average stage's: what simulate.Costs.stages takes."""
    costs = [stage_cost(config, stage, seq_len) for stage in stages]
    average = sum(costs) / len(costs)
    return tuple(cost / average for cost in costs)


class _Cut(NamedTuple):
    """What is to be cut: the blocks' costs as running sums, what the two ends add, and into how many ranks."""

    sums: tuple[float, ...]
    front: float
    back: float
    num_ranks: int
    folded: bool

    @property
    def num_blocks(self) -> int:
        return len(self.sums) - 1

    def loads(self, rank: int, i: int, j: int, a: int, b: int) -> tuple[float, float]:
        """Cost of `rank`'s two stages: a blocks after the i that are gone in front, b before the j gone at the back."""
        end = self.num_blocks - j
        near = self.sums[i + a] - self.sums[i] + (self.front if rank == 0 else 0)
        far = self.sums[end] - self.sums[end - b]
        if rank == (0 if self.folded else self.num_ranks - 1):
            far += self.back
        return near, far

    def moves(self, rank: int, i: int, j: int, limit: float) -> Iterator[tuple[int, int, tuple[float, float]]]:
        """(a, b, loads) that `rank` may take: at least a block a stage, no more than `limit` in all, enough left over
        for the ranks behind it and no more than they may take.

        The last rank takes all that is left.
        """
        after, end = self.num_ranks - 1 - rank, self.num_blocks - j
        room = after * limit * (1 + 1e-9)
        most = self.num_blocks - i - j - after * (2 if self.folded else 1)
        for b in range(1, most) if self.folded else (0,):
            least = bisect_left(self.sums, self.sums[end - b] - room) - i
            for a in range(max(least, 1) if after else most - b, most - b + 1):
                loads = self.loads(rank, i, j, a, b)
                if sum(loads) > limit:
                    break
                yield a, b, loads


def _best(
    cut: _Cut, limit: float, worth: Callable[[float, tuple[float, float]], float]
) -> tuple[float, tuple[tuple[int, int], ...]]:
    """The least worth of all cuts under `limit`, and the (front, back) blocks of each rank.

    Ranks are filled from the outside in; a state is how many blocks are gone from the front and from the back.
    """
    states: dict[tuple[int, int], tuple[float, tuple[tuple[int, int], ...]]] = {(0, 0): (0.0, ())}
    for rank in range(cut.num_ranks):
        following: dict[tuple[int, int], tuple[float, tuple[tuple[int, int], ...]]] = {}
        for (i, j), (value, taken) in states.items():
            for a, b, loads in cut.moves(rank, i, j, limit):
                candidate = (worth(value, loads), (*taken, (a, b)))
                if (i + a, j + b) not in following or candidate < following[i + a, j + b]:
                    following[i + a, j + b] = candidate
        states = following
    return min(states.values())


def _balance(cut: _Cut) -> tuple[tuple[int, int], ...]:
    """First the lightest heaviest rank there can be; then, no rank heavier than that, the most even cut."""
    longest = max(after - before for before, after in pairwise(cut.sums))
    # Ranks that take blocks until they have an even share overshoot by less than a block a stage.
    enough = cut.sums[-1] / cut.num_ranks + cut.front + cut.back + 2 * longest
    heaviest, _ = _best(cut, enough, lambda value, loads: max(value, sum(loads)))
    # Ranks count first; of the cuts that are alike to them, the one with the more even stages.
    return _best(
        cut,
        heaviest * (1 + 1e-12),
        lambda value, loads: value + sum(loads) ** 2 + 1e-6 * (loads[0] ** 2 + loads[1] ** 2),
    )[1]


def _stages(config: ModelConfig, counts: tuple[int, ...]) -> tuple[Stage, ...]:
    stages, first, last = [], 0, len(counts) - 1
    for index, count in enumerate(counts):
        mtp = index == last and config.mtp_depth > 0
        stages.append(Stage(index, range(first, first + count), index == 0, index == last, mtp))
        first += count
    return tuple(stages)


def _check_layout(config: ModelConfig, layout: tuple[int, ...], num_stages: int) -> None:
    written = ",".join(map(str, layout))
    if len(layout) != num_stages:
        raise ConfigError(
            f"layout {written} has {len(layout)} stages, but the schedule has {num_stages}: name {num_stages} counts"
        )
    if min(layout) < 1:
        raise ConfigError(f"layout {written} has a stage of {min(layout)} blocks: give each at least 1")
    off = config.num_layers - sum(layout)
    if off:
        fix = f"add {off} more" if off > 0 else f"take {-off} away"
        raise ConfigError(f"layout {written} places {sum(layout)} blocks, but the model has {config.num_layers}: {fix}")


@lru_cache(maxsize=1024)  # a search asks for few of them, often
def partition(
    config: ModelConfig,
    num_stages: int,
    *,
    seq_len: int | None = None,
    folded: bool = False,
    layout: tuple[int, ...] | None = None,
) -> tuple[Stage, ...]:
    """Cut the model's blocks into `num_stages` contiguous stages.

    seq_len: tokens of a sequence, for attention's share (default: the model's longest). folded: stages r and
    num_stages - 1 - r share a rank (DualPipe, DualPipeV). layout: blocks of each stage, given by hand.
    Errors: ConfigError when there are fewer blocks than stages, or when the layout doesn't place every block once.
    """
    if num_stages < 1 or (folded and num_stages % 2):
        raise ConfigError(f"{num_stages} stages can't be cut{' and folded' if folded else ''}: use {num_stages + 1}")
    if config.num_layers < num_stages:
        raise ConfigError(
            f"{config.num_layers} blocks can't fill {num_stages} pipeline stages, one each at least: use at most "
            f"{config.num_layers} stages"
        )
    if layout is not None:
        _check_layout(config, layout, num_stages)
        return _stages(config, layout)
    length = config.max_seq_len if seq_len is None else seq_len
    blocks = [block_cost(config, layer, length) for layer in range(config.num_layers)]
    back = head_cost(config) + mtp_cost(config, length)
    num_ranks = num_stages // 2 if folded else num_stages
    cut = _Cut(tuple(accumulate(blocks, initial=0.0)), embedding_cost(config), back, num_ranks, folded)
    taken = _balance(cut)
    fronts = [a for a, _ in taken]
    backs = [b for _, b in reversed(taken)] if folded else []
    return _stages(config, (*fronts, *backs))


def imbalance(config: ModelConfig, stages: tuple[Stage, ...], seq_len: int, folded: bool) -> float:
    """The heaviest rank's work over the average rank's: 1.0 is even."""
    costs = relative_costs(config, stages, seq_len)
    ranks = [(a + b) / 2 for a, b in zip(costs, reversed(costs), strict=True)] if folded else list(costs)
    return max(ranks)
