"""What a run sees of each of its data sets: documents, tokens, weight, and how often it reads them (epochs)."""

from __future__ import annotations

from dataclasses import dataclass

from fp8moe.data.packing import Dataset, PackedDataset
from fp8moe.data.sampler import BlendedDataset


@dataclass(frozen=True)
class SourceUse:
    """One data set in a run. weight: its share of the samples. drawn: its tokens that the run reads, without padding.

    epochs: how often the run reads all of it, 0.5 for half of it. padding: share of its samples' places.
    """

    name: str
    documents: int
    tokens: int
    weight: float
    drawn: int
    epochs: float
    padding: float


def uses(dataset: Dataset, num_samples: int, seq_len: int) -> list[SourceUse]:
    """What the first `num_samples` samples of `dataset` are of each of its sources, in their order.

    Sources that are no token files are left out.
    """
    if isinstance(dataset, BlendedDataset):
        parts, weights, counts = dataset.sources, dataset.weights, dataset.counts(num_samples)
    else:
        parts, weights, counts = [dataset], [1], [num_samples]
    found = []
    for part, weight, count in zip(parts, weights, counts, strict=True):
        if not isinstance(part, PackedDataset):
            continue
        share, padding, drawn = weight / sum(weights), 0.0, count * seq_len
        if part.whole_documents:
            padding = 1 - part.tokens_with_fim() / (len(part) * (seq_len + 1))
            drawn = round(count / len(part) * part.tokens_with_fim())
        found.append(
            SourceUse(part.name, part.num_documents, part.num_tokens, share, drawn, count / len(part), padding)
        )
    return found


def table(found: list[SourceUse]) -> list[str]:
    """The lines of a table of `found`, aligned."""
    rows = [("data", "documents", "tokens", "weight", "the run draws", "epochs", "padding")]
    rows += [
        (
            one.name,
            f"{one.documents:,}",
            f"{one.tokens:,}",
            f"{one.weight:.1%}",
            f"{one.drawn:,}",
            f"{one.epochs:.3g}" if one.epochs < 100 else f"{one.epochs:,.0f}",
            f"{one.padding:.1%}",
        )
        for one in found
    ]
    if not any(one.padding for one in found):
        rows = [row[:-1] for row in rows]  # type: ignore[misc]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
