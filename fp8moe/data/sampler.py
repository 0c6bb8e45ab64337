"""Which samples come next, for any number of ranks.

The stream of samples is endless and the same for every layout: which text sample n holds (shuffled documents, shuffled
windows, another order in each epoch) is decided by the data set from (seed, n) alone. So the whole state of a sampler
is two integers, a resume in the middle of an epoch needs no replay, and the global batch size and the number of ranks
may change from one step to the next without changing the stream. Refused: a permuted list kept here, whose state is the
list, and a split of the data among ranks, whose order depends on how many they are.
"""

from __future__ import annotations

from collections.abc import Mapping

from fp8moe.errors import ConfigError, DataError


class Sampler:
    """Hands out sample numbers in order.

    num_samples: samples in one epoch of the data set (only `epoch` depends on it).
    seed: the seed the data set was opened with.
    consumed: samples handed out so far.
    """

    def __init__(self, num_samples: int, seed: int, consumed: int = 0) -> None:
        if num_samples < 1:
            raise DataError(f"a training set needs at least 1 sample, got {num_samples}: shorten seq_len or add text")
        if consumed < 0:
            raise ConfigError(f"consumed={consumed} samples is not possible: it must be at least 0")
        self.num_samples = num_samples
        self.seed = seed
        self.consumed = consumed

    @property
    def epoch(self) -> int:
        """The epoch, from 0, that the next sample belongs to."""
        return self.consumed // self.num_samples

    def next_indices(self, global_batch: int) -> list[int]:
        """The next `global_batch` sample numbers, all ranks' together; `rank_slice` takes one rank's share."""
        if global_batch < 1:
            raise ConfigError(f"global_batch={global_batch} must be at least 1")
        first = self.consumed
        self.consumed += global_batch
        return list(range(first, self.consumed))

    def state_dict(self) -> dict[str, int]:
        """The whole state: seed and consumed."""
        return {"seed": self.seed, "consumed": self.consumed}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes on where `state` was taken. Raises ConfigError when its order was another one."""
        if state["seed"] != self.seed:
            raise ConfigError(
                f"the checkpoint read its data in the order of seed {state['seed']} and this run has seed {self.seed}: "
                f"use seed={state['seed']}"
            )
        if state["consumed"] < 0:
            raise ConfigError(f"the checkpoint consumed {state['consumed']} samples: the number must be at least 0")
        self.consumed = state["consumed"]


def rank_slice(indices: list[int], rank: int, num_ranks: int) -> list[int]:
    """The consecutive share of a global batch that data-parallel rank `rank` of `num_ranks` computes."""
    if len(indices) % num_ranks:
        lower = len(indices) // num_ranks * num_ranks
        nearest = f"{lower} or {lower + num_ranks}" if lower else num_ranks
        raise ConfigError(
            f"a global batch of {len(indices)} samples can't be shared by {num_ranks} ranks: use {nearest}"
        )
    share = len(indices) // num_ranks
    return indices[rank * share : (rank + 1) * share]
