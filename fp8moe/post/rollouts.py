"""Rollouts: groups of completions with their rewards, where they come from, and how they are kept.

A generator is asked for G samples of each prompt; the built-in one runs the weights that are being trained, in place,
experts over ep, layers over pp (`generate.groups`), another asks a server (`rollout_server`). What the built-in one
draws is decided by (seed, batch, problem, sample) alone, so a batch of rollouts that a run needs again is made again to
the bit, as long as the weights are those it began with. Between the updates of one batch they are not: a batch of
several updates is kept in the run directory, `rollouts/batch-N.npz`, for a run that resumes there.

Legend: N samples in groups of G, K tokens of all completions, sample after sample.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fp8moe.generate.captured import decoding_graphs
from fp8moe.generate.groups import GroupSampling, Sampled, sample_groups
from fp8moe.generate.samples import exact_dispatch
from fp8moe.generate.stages import stages_of
from fp8moe.train.run import Run

logger = logging.getLogger(__name__)
FOLDER = "rollouts"
KEPT = 8  # files of the newest batches


class Generator(Protocol):
    """What samples completions. Collective over all ranks; every rank gets all of them."""

    def sample(
        self, prompts: Sequence[Sequence[int]], names: Sequence[str], sampling: GroupSampling, max_age: int = 0
    ) -> list[list[Sampled]]:
        """`sampling.samples` completions of each prompt, which its name and their numbers alone decide.

        max_age: steps by which the weights may be older than the present ones.
        """
        ...

    def ahead(
        self, prompts: Sequence[Sequence[int]], names: Sequence[str], sampling: GroupSampling, max_age: int
    ) -> None:
        """What a later `sample` will ask for: a generator that computes elsewhere begins with it."""
        ...

    @property
    def drawn_by(self) -> int:
        """The step of the weights that gave the last samples."""
        ...


class BuiltIn:
    """The model that is trained, with its present weights and without a copy of them."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def sample(
        self, prompts: Sequence[Sequence[int]], names: Sequence[str], sampling: GroupSampling, max_age: int = 0
    ) -> list[list[Sampled]]:
        run = self._run
        if run.zero is not None:
            run.zero.wait_weights()
        graphs = None
        if run.config.grpo.cuda_graphs:
            graphs = decoding_graphs(run.mesh, run.config.model.experts.num_experts, sampling.rows)
        with exact_dispatch(run):
            return sample_groups(run.model, prompts, names, sampling, run.mesh, stages_of(run), graphs)

    def ahead(
        self, prompts: Sequence[Sequence[int]], names: Sequence[str], sampling: GroupSampling, max_age: int
    ) -> None:
        """Nothing: it computes where the training does."""

    @property
    def drawn_by(self) -> int:
        return self._run.step


@dataclass(frozen=True)
class Rollouts:
    """A batch of rollouts. prompts: of each group; completions, ended: of each sample. rewards FP64 [N], NaN where a
    sample could not be scored; parts [N, rewards]: each one's value. Log-probabilities, FP32 [K]: rollout, by the
    generator; old, by training's forward before the first update, 0 until it was done; reference likewise. routing: of
    each sample, as `Sampled` has it; None where it was not asked for."""

    prompts: tuple[tuple[int, ...], ...]
    completions: tuple[tuple[int, ...], ...]
    ended: Tensor
    rollout: Tensor
    rewards: Tensor
    parts: Tensor
    old: Tensor
    reference: Tensor | None = None
    routing: tuple[NDArray[Any], ...] | None = None

    @cached_property
    def lengths(self) -> Tensor:
        """int64 [N]."""
        return torch.tensor([len(one) for one in self.completions])

    @cached_property
    def starts(self) -> list[int]:
        """Where each sample's tokens begin among the K."""
        return [0, *accumulate(map(len, self.completions))]

    @property
    def group(self) -> int:
        return len(self.completions) // len(self.prompts)

    def figures(self, rewards: Sequence[str]) -> dict[str, Any]:
        """Means over samples, of their rewards by these names as well."""
        if not self.completions:
            return {}
        scored = ~self.rewards.isnan()
        parts = self.parts[scored]
        return {
            "reward": float(self.rewards[scored].mean()) if bool(scored.any()) else None,
            "rewards": {name: float(parts[:, i].mean()) for i, name in enumerate(rewards) if len(parts)},
            "completion_length": float(self.lengths.double().mean()),
            "ended_share": float(self.ended.double().mean()),
        }

    def only(self, groups: Sequence[int]) -> Rollouts:
        """The batch of these groups alone, before log-probabilities were taken."""
        samples = [group * self.group + i for group in groups for i in range(self.group)]
        tokens = [torch.arange(self.starts[n], self.starts[n + 1]) for n in samples]
        places = torch.cat(tokens) if tokens else torch.zeros(0, dtype=torch.int64)
        return Rollouts(
            tuple(self.prompts[group] for group in groups),
            tuple(self.completions[n] for n in samples),
            self.ended[samples],
            self.rollout[places],
            self.rewards[samples],
            self.parts[samples],
            self.old[places],
            routing=None if self.routing is None else tuple(self.routing[n] for n in samples),
        )

    def joined(self, other: Rollouts) -> Rollouts:
        """Both, before log-probabilities were taken."""
        ours, theirs = vars(self), vars(other)
        both: dict[str, Any] = {name: ours[name] + theirs[name] for name in ("prompts", "completions")}
        for name in ("ended", "rollout", "rewards", "parts", "old"):
            both[name] = torch.cat([ours[name], theirs[name]])
        if self.routing is not None and other.routing is not None:
            both["routing"] = self.routing + other.routing
        return Rollouts(**both)


def rollouts_of(prompts: Sequence[Sequence[int]], groups: Sequence[Sequence[Sampled]], parts: int) -> Rollouts:
    """A batch of what a generator gave, not scored yet."""
    samples = [one for group in groups for one in group]
    rollout = torch.tensor([value for one in samples for value in one.logprobs], dtype=torch.float32)
    routing = tuple(one.routing for one in samples if one.routing is not None)
    return Rollouts(
        tuple(tuple(prompt) for prompt in prompts),
        tuple(one.ids for one in samples),
        torch.tensor([one.has_ended for one in samples]),
        rollout,
        torch.full((len(samples),), float("nan"), dtype=torch.float64),
        torch.full((len(samples), parts), float("nan"), dtype=torch.float64),
        torch.zeros_like(rollout),
        routing=routing if len(routing) == len(samples) > 0 else None,
    )


def save(rollouts: Rollouts, run_dir: Path, number: int) -> None:
    """Keep a batch in the run directory, and the newest KEPT alone."""
    folder = run_dir / FOLDER
    folder.mkdir(exist_ok=True)
    arrays: dict[str, np.ndarray[Any, Any]] = {
        name: value.numpy() for name, value in vars(rollouts).items() if isinstance(value, Tensor) and name != "lengths"
    }
    for name in ("prompts", "completions"):
        found: tuple[tuple[int, ...], ...] = getattr(rollouts, name)
        arrays[name] = np.array([token for one in found for token in one], dtype=np.int64)
        arrays[f"{name}_lengths"] = np.array([len(one) for one in found], dtype=np.int64)
    if rollouts.routing is not None:
        arrays["routing"] = np.concatenate(rollouts.routing)
    part = folder / f".batch-{number:06d}.part.npz"
    np.savez(part, **arrays)  # type: ignore[arg-type]
    part.replace(folder / f"batch-{number:06d}.npz")
    for old in sorted(folder.glob("batch-*.npz"))[:-KEPT]:
        old.unlink(missing_ok=True)


def load(run_dir: Path, number: int) -> Rollouts | None:
    """The batch that was kept; None where there is none that can be read."""
    path = run_dir / FOLDER / f"batch-{number:06d}.npz"
    try:
        with np.load(path) as arrays:  # which refuses pickles
            values = {name: arrays[name] for name in arrays.files}
        cut: dict[str, Any] = {}
        for name in ("prompts", "completions"):
            ends = np.cumsum(values.pop(f"{name}_lengths"))[:-1]
            cut[name] = tuple(tuple(part.tolist()) for part in np.split(values.pop(name), ends))
        if "routing" in values:
            group = len(cut["completions"]) // len(cut["prompts"])
            counts = [len(cut["prompts"][n // group]) + len(one) - 1 for n, one in enumerate(cut["completions"])]
            cut["routing"] = tuple(np.split(values.pop("routing"), np.cumsum(counts)[:-1]))
        return Rollouts(**(cut | {name: torch.from_numpy(value) for name, value in values.items()}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s can't be read (%s)", path, error)
        return None


def with_logprobs(rollouts: Rollouts, old: Tensor, reference: Tensor | None) -> Rollouts:
    """The batch with the log-probabilities of training's forward."""
    return replace(rollouts, old=old, reference=reference)
