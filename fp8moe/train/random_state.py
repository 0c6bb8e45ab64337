"""State of PyTorch's random generators, a rank's, as a checkpoint holds it: uint8 tensors rng.cpu.RANK, rng.cuda.RANK.

No part of a run draws from them today: initial weights come from a generator a parameter (`model/transformer`), the
order of the data from the seed and the sampler's count (`data/packing`), and neither Python's `random` nor NumPy's
global generator is used. They are seeded and kept so that a layer that does draw, dropout for example, draws the same
in each run of a seed, and resumes to the bit: PyTorch seeds a process's own by chance. A state belongs to its rank: on
another number of ranks there is none to restore, and generators are as seeded.
"""

from __future__ import annotations

from collections.abc import Container, Mapping

import torch
from torch import Tensor


def seed_random(seed: int, rank: int) -> None:
    """Seed this rank's generators, on every device, unlike those of other ranks."""
    torch.manual_seed(((seed << 20) + rank) % 2**63)


def random_state(device: torch.device, rank: int) -> dict[str, Tensor]:
    """Copies of the states of this rank's generators, by name."""
    states = {f"rng.cpu.{rank}": torch.get_rng_state()}
    if device.type == "cuda":
        states[f"rng.cuda.{rank}"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: Mapping[str, Tensor], device: torch.device, rank: int) -> None:
    """Set this rank's generators to states that `random_state` gave."""
    torch.set_rng_state(states[f"rng.cpu.{rank}"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[f"rng.cuda.{rank}"], device)


def is_stored(states: Mapping[str, Tensor], stored: Container[str], world_size: int) -> bool:
    """Whether a checkpoint with tensors of the names `stored` was written by as many ranks, on the same devices."""
    names = {f"rng.cpu.{rank}" for rank in range(world_size)} | set(states)
    return all(name in stored for name in names) and f"rng.cpu.{world_size}" not in stored
