"""Scores of a batch of rollouts: its samples are shared out over the ranks, and every rank gets all scores.

Built-in rewards are computed in place, a user's in the rank's own process (`post.function_process`). A rank whose calls
take long must not make the others wait in one collective for longer than it may take, so all meet every MEETING seconds
until the last is done. A function that raises, gives no finite number, takes too long or ends its process excludes that
sample: it is named, counted, and takes part in no mean.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from fp8moe.errors import ConfigError
from fp8moe.parallel.collectives import all_reduce, gather
from fp8moe.parallel.mesh import Mesh
from fp8moe.post.function_process import FunctionProcess
from fp8moe.post.function_worker import reward_arguments
from fp8moe.post.rewards import REWARDS
from fp8moe.post.rollouts import Rollouts
from fp8moe.post.tasks import Problem
from fp8moe.train.grpo_config import GrpoConfig

logger = logging.getLogger(__name__)
MEETING = 1.0  # seconds between two meetings of the ranks
MOST_NAMED = 5  # samples of a batch that could not be scored, in the log


@dataclass(frozen=True)
class Sample:
    """A completion's text, and its number among those of its problem."""

    problem: Problem
    text: str
    number: int


@dataclass(frozen=True)
class Scored:
    """Of one completion: the weighted sum, NaN where it could not be scored; each reward's value; why it could not."""

    total: float
    parts: tuple[float, ...]
    failure: str | None = None


class Scorer:
    """The rewards of a run. names: those of the registry, or `module:function`."""

    def __init__(self, config: GrpoConfig) -> None:
        """Raises ConfigError where there is no such reward."""
        self.names, self._weights = config.rewards, config.reward_weights or (1.0,) * len(config.rewards)
        own = [name for name in self.names if name not in REWARDS]
        for name in own:
            if ":" not in name:
                raise ConfigError(
                    f"grpo.rewards={name} is not one of {', '.join(REWARDS)}: use one of them, or module:function"
                )
        self._process = FunctionProcess("reward", own, config.reward_timeout) if own else None
        self._samples: Sequence[Sample] = ()

    def begin(self, samples: Sequence[Sample]) -> None:
        """Begin with the samples of a batch."""
        self._samples = samples
        if self._process is not None:
            self._process.begin([reward_arguments(one.problem, one.text) for one in samples])

    def run(self, seconds: float) -> bool:
        """Go on for so many seconds at most; whether all are scored."""
        return self._process is None or self._process.run(seconds)

    def scores(self) -> list[Scored]:
        """Of all samples."""
        return [self._scored(number, sample) for number, sample in enumerate(self._samples)]

    def close(self) -> None:
        """End the process of a user's rewards."""
        if self._process is not None:
            self._process.close()

    def _scored(self, number: int, sample: Sample) -> Scored:
        given = iter(() if self._process is None else self._process.found[number])
        parts: list[float] = []
        for name in self.names:
            value = REWARDS[name](sample.problem, sample.text) if name in REWARDS else next(given)
            if not isinstance(value, float):
                sentence = (
                    f"sample {sample.number} of {sample.problem.prompt!r:.200} is excluded: the reward {name} {value}"
                )
                return Scored(math.nan, tuple([*parts, *[math.nan] * (len(self.names) - len(parts))]), sentence)
            parts.append(value)
        return Scored(sum(part * weight for part, weight in zip(parts, self._weights, strict=True)), tuple(parts))


def score_rollouts(
    rollouts: Rollouts, problems: Sequence[Problem], text_of: Callable[[Sequence[int]], str], scorer: Scorer, mesh: Mesh
) -> tuple[Rollouts, int]:
    """The rollouts of these problems with their rewards, and how many samples could not be scored. Collective over all
    ranks. text_of: the text of a completion's ids."""
    group, numbers = rollouts.group, range(mesh.rank, len(rollouts.completions), mesh.world_size)
    scorer.begin([Sample(problems[n // group], text_of(rollouts.completions[n]), n % group) for n in numbers])
    while True:
        is_done = torch.tensor(int(scorer.run(MEETING)))
        if bool(all_reduce(is_done, mesh.world_group, dist.ReduceOp.MIN)):
            break
    mine = dict(zip(numbers, scorer.scores(), strict=True))
    every = {n: one for of_rank in gather(mine, mesh.world_group) for n, one in of_rank.items()}
    scores = [every[n] for n in range(len(every))]
    failed = [one.failure for one in scores if one.failure is not None]
    for sentence in failed[:MOST_NAMED]:
        logger.warning("%s", sentence)
    if len(failed) > MOST_NAMED:
        logger.warning("%d more samples of this batch could not be scored", len(failed) - MOST_NAMED)
    rewards = torch.tensor([one.total for one in scores], dtype=torch.float64)
    parts = torch.tensor([one.parts for one in scores], dtype=torch.float64)
    return replace(rollouts, rewards=rewards, parts=parts), len(failed)
