"""Rollouts: groups of completions with their rewards, where they come from, and how they lie in micro-batches.

A generator is asked for G samples of each prompt; the built-in one runs the weights that are being trained, in place,
experts over ep (`generate.groups`), another asks a server (`rollout_server`). What the built-in one draws is decided by
(seed, batch, problem, sample) alone, so a batch of rollouts that a run needs again is made again to the bit, as long as
the weights are those it began with. Between the updates of one batch they are not: a batch of several updates is kept
in the run directory, `rollouts/batch-N.npz`, for a run that resumes there.

Legend: N samples in groups of G, S tokens of a row, K tokens of all completions, sample after sample.
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

from fp8moe.data.packing import Batch, Window, collate
from fp8moe.generate.groups import GroupSampling, Sampled, sample_groups
from fp8moe.generate.samples import exact_dispatch
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
        with exact_dispatch(run):
            return sample_groups(run.model, prompts, names, sampling, run.mesh)

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


@dataclass(frozen=True)
class Packed:
    """Rows of samples: micro-batches of one rank, and by label int64 [M, T] the place of its token among the K, -1
    where none is predicted. rows: of all ranks. tokens: predicted by all of them."""

    batches: list[Batch]
    places_MT: Tensor
    rows: int
    tokens: int

    def spread(self, values_K: Tensor) -> Tensor:
        """Values of tokens as FP32 [M, T], 0 where nothing is predicted."""
        if not values_K.numel():
            return torch.zeros(self.places_MT.shape)
        return values_K.float()[self.places_MT.clamp(min=0)] * (self.places_MT >= 0)

    def collected(self, values_MT: Tensor, count: int) -> Tensor:
        """FP32 [K]: the values of this rank's labels at their tokens, 0 of the others'."""
        found, at = torch.zeros(count), self.places_MT >= 0
        found[self.places_MT[at]] = values_MT[at]
        return found

    def with_own_experts(self) -> Packed:
        """The same rows, for a model whose routers choose."""
        return replace(self, batches=[replace(batch, experts_BSLK=None) for batch in self.batches])


def pack(rollouts: Rollouts, samples: Sequence[int], run: Run, *, least: int, multiple: int) -> Packed:
    """Rows of the samples with these numbers, as many on every rank.

    With data.document_mask several samples share a row, the longest first, each a document of its own; else each has
    one. Rows of nothing fill up the last micro-batches. least, multiple: micro-batches that the schedule needs.
    """
    config, mesh = run.config, run.mesh
    sizes = {n: len(rollouts.prompts[n // rollouts.group]) + len(rollouts.completions[n]) for n in samples}
    rows: list[list[int]] = []
    free: list[int] = []
    for n in sorted(samples, key=lambda n: -sizes[n]):
        at = next((i for i, room in enumerate(free) if room >= sizes[n]), None) if config.data.document_mask else None
        if at is None:
            at = len(rows)
            rows.append([])
            free.append(config.seq_len + 1)
        rows[at].append(n)
        free[at] -= sizes[n]
    unit = mesh.dp * config.micro_batch
    count = max(least, -(-max(-(-len(rows) // unit), 1) // multiple) * multiple) * config.micro_batch
    mine = [rows[i] if i < len(rows) else [] for i in range(mesh.dp_rank, count * mesh.dp, mesh.dp)]
    windows, places = zip(*(_row(rollouts, row, config.seq_len) for row in mine), strict=True)
    batches = [
        collate(windows[i : i + config.micro_batch], document_mask=config.data.document_mask)
        for i in range(0, count, config.micro_batch)
    ]
    if rollouts.routing is not None:
        experts = _experts(rollouts, rollouts.routing, mine, config.seq_len).split(config.micro_batch)
        batches = [replace(batch, experts_BSLK=part) for batch, part in zip(batches, experts, strict=True)]
    tokens = sum(len(rollouts.completions[n]) for n in samples)
    return Packed(batches, torch.from_numpy(np.stack(places)).view(len(batches), -1), count * mesh.dp, tokens)


def _row(rollouts: Rollouts, samples: Sequence[int], seq_len: int) -> tuple[Window, np.ndarray[Any, Any]]:
    """(a row of these samples, the place of each label's token among the K)."""
    tokens, places = np.zeros(seq_len + 1, dtype=np.int64), np.full(seq_len + 1, -1, dtype=np.int64)
    starts, filled = [0], 0
    for n in samples:
        prompt, completion = rollouts.prompts[n // rollouts.group], rollouts.completions[n]
        starts.append(filled)
        behind = filled + len(prompt)
        end = behind + len(completion)
        tokens[filled:behind], tokens[behind:end] = prompt, completion
        places[behind:end] = rollouts.starts[n] + np.arange(len(completion))
        filled = end
    filled = max(filled, 1)  # a row of nothing is a document of one token
    window = Window(tokens, np.unique(starts), len(tokens) - filled, (places >= 0).astype(np.uint8))
    return window, places[1:]


def _experts(
    rollouts: Rollouts, routing: Sequence[NDArray[Any]], rows: Sequence[Sequence[int]], seq_len: int
) -> Tensor:
    """[rows, S, L, K]: the experts of the inputs of rows of samples, as `_row` lays them; -1 of a sample's last token,
    which the generator put through no layer, and of padding."""
    dtype = np.promote_types(routing[0].dtype, np.int16)
    experts = np.full((len(rows), seq_len, *routing[0].shape[1:]), -1, dtype=dtype)
    for row, samples in zip(experts, rows, strict=True):
        filled = 0
        for n in samples:
            row[filled : filled + len(routing[n])] = routing[n]
            filled += len(routing[n]) + 1
    return torch.from_numpy(experts)


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
