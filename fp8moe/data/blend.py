"""Several data sets mixed by weight into one stream of samples.

Sample n of the mixture is sample k of source d, by a closed form in n: source 0 takes sample n when floor((n+1) w)
steps past floor(n w), and the samples it leaves are shared among the others the same way. So after ANY number of
samples each source is within a few samples of its exact share, nothing is drawn at random, nothing is stored, and a
resume at sample 10^12 costs what the first sample costs. Weights become integers first: a floating product is off by
one sample at some n (49 times 1/49 is below 1). Refused: the greedy largest-error-first rule, which has the same
balance but must be replayed from the start or stored.
"""

from __future__ import annotations

from collections.abc import Sequence

from fp8moe.data.packing import Batch, Dataset, Window, collate
from fp8moe.errors import ConfigError

_RESOLUTION = 1 << 20


def integer_weights(weights: Sequence[float]) -> list[int]:
    """Integers in the ratio of `weights` (exact when they are integers, else to one in a million of their sum)."""
    if all(float(weight).is_integer() for weight in weights):
        return [int(weight) for weight in weights]
    total = sum(weights)
    return [max(1, round(weight / total * _RESOLUTION)) if weight else 0 for weight in weights]


class BlendedDataset:
    """The mixture of `sources` by `weights` (samples per sample of the mixture).

    `len()` is one epoch: the most samples during which no source has to repeat one.
    """

    def __init__(self, sources: Sequence[Dataset], weights: Sequence[float], *, document_mask: bool) -> None:
        if len(sources) != len(weights):
            raise ConfigError(f"{len(sources)} data sets and {len(weights)} weights: give one weight a data set")
        if any(not weight >= 0 or weight == float("inf") for weight in weights):
            raise ConfigError(f"weights {list(weights)}: each must be a number >= 0, 0 leaves a data set out")
        if not any(weights):
            raise ConfigError(f"all {len(weights)} weights are 0: at least one must be above 0")
        self.document_mask = document_mask
        self.sources = list(sources)
        self.weights = integer_weights(weights)
        self._length = self._epoch_length()

    @property
    def fingerprint(self) -> str:
        """Names content and mixture for caches."""
        parts = [f"{weight}*{source.fingerprint}" for source, weight in zip(self.sources, self.weights, strict=True)]
        return "+".join(parts)

    def __len__(self) -> int:
        return self._length

    def counts(self, num_samples: int) -> list[int]:
        """How many of the first `num_samples` samples come from each source."""
        counts, left, total = [], num_samples, sum(self.weights)
        for weight in self.weights:
            taken = left * weight // total if total else 0
            counts.append(taken)
            left, total = left - taken, total - weight
        return counts

    def locate(self, sample_id: int) -> tuple[int, int]:
        """(source, sample of that source) of sample `sample_id`, at least 0."""
        assert sample_id >= 0
        before, after = self.counts(sample_id), self.counts(sample_id + 1)
        source = next(d for d in range(len(before)) if after[d] != before[d])
        return source, before[source]

    def _epoch_length(self) -> int:
        sizes = [len(source) for source in self.sources]
        # Counts only grow with the number of samples, and n samples need n different ones: bisect between 0 and all.
        enough, too_many = 0, sum(sizes) + 1
        while too_many - enough > 1:
            middle = (enough + too_many) // 2
            if all(count <= size for count, size in zip(self.counts(middle), sizes, strict=True)):
                enough = middle
            else:
                too_many = middle
        return enough

    def window(self, sample_id: int) -> Window:
        """The tokens of sample `sample_id`."""
        source, inner = self.locate(sample_id)
        return self.sources[source].window(inner)

    def batch(self, sample_ids: Sequence[int]) -> Batch:
        """Samples by number, in the order asked for."""
        return collate([self.window(sample_id) for sample_id in sample_ids], document_mask=self.document_mask)
