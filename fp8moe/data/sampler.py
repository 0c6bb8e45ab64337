"""Sampler: the numbers of the samples of each step, and the mixture of several data sets into one stream.

The stream of samples is endless and the same for every number of ranks: the text of sample n (documents and windows
shuffled, in another order each epoch) depends on (seed, n) alone. So the state of a sampler is two integers, a resume
in the middle of an epoch replays nothing, and the global batch size and the number of ranks may change between steps
without changing the stream. Refused: a shuffled list kept here, which would itself be the state; and a part of the
data for each rank, whose order would depend on the number of ranks.

Sample n of a mixture is sample k of data set d, by a closed form in n: data set 0 takes sample n when floor((n+1) w) is
above floor(n w), and the other samples are divided among the others in the same way. So after ANY number of samples the
count of each data set is within a few samples of its exact share, nothing is random, nothing is stored, and resuming at
sample 10^12 costs as much as the first sample. Weights become integers first, because products of floats are off by one
sample at some n (49 times 1/49 is below 1). Refused: always taking from the data set furthest below its share, which is
as even but must be replayed from the start or stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fp8moe.data.cache import key_of
from fp8moe.data.packing import Batch, Dataset, Window, collate
from fp8moe.errors import ConfigError, DataError

_RESOLUTION = 1 << 20


class Sampler:
    """The sample numbers of each step, in order.

    num_samples: samples in one epoch of the data set (only `epoch` depends on it).
    seed: the seed the data set was opened with.
    consumed: number of samples given out so far.
    """

    def __init__(self, num_samples: int, seed: int, consumed: int = 0) -> None:
        if num_samples < 1:
            raise DataError(
                f"a training set needs at least 1 sample, got {num_samples}: use a smaller seq_len or add text"
            )
        if consumed < 0:
            raise ConfigError(f"consumed={consumed} must be at least 0")
        self.num_samples = num_samples
        self.seed = seed
        self.consumed = consumed

    @property
    def epoch(self) -> int:
        """The epoch of the next sample, from 0."""
        return self.consumed // self.num_samples

    def next_indices(self, global_batch: int) -> list[int]:
        """The next `global_batch` sample numbers, of all ranks together; `rank_slice` gives the share of one rank."""
        if global_batch < 1:
            raise ConfigError(f"global_batch={global_batch} must be at least 1")
        first = self.consumed
        self.consumed += global_batch
        return list(range(first, self.consumed))

    def state_dict(self) -> dict[str, int]:
        """The state: seed and consumed."""
        return {"seed": self.seed, "consumed": self.consumed}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continues after the samples of `state`. Raises ConfigError when its seed is another."""
        if state["seed"] != self.seed:
            raise ConfigError(
                f"the checkpoint used the sample order of seed {state['seed']} and this run has seed {self.seed}: "
                f"use seed={state['seed']}"
            )
        if state["consumed"] < 0:
            raise ConfigError(f"the checkpoint has consumed={state['consumed']} samples: it must be at least 0")
        self.consumed = state["consumed"]


def rank_slice(indices: list[int], rank: int, num_ranks: int) -> list[int]:
    """The part of a global batch for data-parallel rank `rank`: one of `num_ranks` consecutive, equal parts."""
    if len(indices) % num_ranks:
        lower = len(indices) // num_ranks * num_ranks
        nearest = f"{lower} or {lower + num_ranks}" if lower else num_ranks
        raise ConfigError(f"{num_ranks} ranks do not divide a global batch of {len(indices)} samples: use {nearest}")
    share = len(indices) // num_ranks
    return indices[rank * share : (rank + 1) * share]


def integer_weights(weights: Sequence[float]) -> list[int]:
    """Integers in the ratio of `weights`: exact for integers, else within one millionth of the sum."""
    if all(float(weight).is_integer() for weight in weights):
        return [int(weight) for weight in weights]
    total = sum(weights)
    return [max(1, round(weight / total * _RESOLUTION)) if weight else 0 for weight in weights]


class BlendedDataset:
    """Several data sets mixed by weight into one stream of samples.

    weights: share of each data set in the samples, any sum.
    `len()` is one epoch: the largest number of samples in which no data set repeats one.
    """

    def __init__(self, sources: Sequence[Dataset], weights: Sequence[float], *, document_mask: bool) -> None:
        if len(sources) != len(weights):
            raise ConfigError(f"{len(sources)} data sets have {len(weights)} weights: give one weight a data set")
        if any(not weight >= 0 or weight == float("inf") for weight in weights):
            raise ConfigError(f"the weights of data sets are {list(weights)}: each must be a finite number >= 0")
        if not any(weights):
            raise ConfigError(f"the {len(weights)} weights of data sets are all 0: at least one must be above 0")
        self.document_mask = document_mask
        self.sources = list(sources)
        self.weights = integer_weights(weights)
        self._length = self._epoch_length()

    @property
    def fingerprint(self) -> str:
        """A name of content and mixture, for caches."""
        parts = [f"{weight}*{source.fingerprint}" for source, weight in zip(self.sources, self.weights, strict=True)]
        return "+".join(parts)

    def content(self) -> str:
        """A hash of text and mixture, wherever the files lie."""
        return key_of(self.weights, [source.content() for source in self.sources])

    def __len__(self) -> int:
        return self._length

    def counts(self, num_samples: int) -> list[int]:
        """The number of samples of each data set among the first `num_samples`."""
        counts, left, total = [], num_samples, sum(self.weights)
        for weight in self.weights:
            taken = left * weight // total if total else 0
            counts.append(taken)
            left, total = left - taken, total - weight
        return counts

    def locate(self, sample_id: int) -> tuple[int, int]:
        """(data set, its sample number) of sample `sample_id` >= 0."""
        assert sample_id >= 0
        before, after = self.counts(sample_id), self.counts(sample_id + 1)
        source = next(d for d in range(len(before)) if after[d] != before[d])
        return source, before[source]

    def _epoch_length(self) -> int:
        sizes = [len(source) for source in self.sources]
        # Counts never fall as the number of samples grows, so bisect between 0 and the sum of all sizes.
        enough, too_many = 0, sum(sizes) + 1
        while too_many - enough > 1:
            middle = (enough + too_many) // 2
            if all(count <= size for count, size in zip(self.counts(middle), sizes, strict=True)):
                enough = middle
            else:
                too_many = middle
        return enough

    def window(self, sample_id: int) -> Window:
        """The tokens of sample `sample_id` >= 0."""
        source, inner = self.locate(sample_id)
        return self.sources[source].window(inner)

    def batch(self, sample_ids: Sequence[int]) -> Batch:
        """The samples `sample_ids`, in that order."""
        return collate([self.window(sample_id) for sample_id in sample_ids], document_mask=self.document_mask)
