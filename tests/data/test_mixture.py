"""What a run will see of each source: counted from the samples themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fp8moe.data.build import open_data
from fp8moe.data.indexed import IndexedDataset
from fp8moe.data.mixture import table, uses
from fp8moe.data.sources import DataConfig

MakeTokens = Callable[..., IndexedDataset]


@pytest.fixture
def config(make_tokens: MakeTokens, tmp_path: Path) -> Callable[..., DataConfig]:
    """Two files of ids 1 to 99 and 101 to 199, and a validation file; 30 and 20 documents, 4 of them empty."""
    make_tokens([[1 + i % 99] * (1 + i % 17) for i in range(28)] + [[]] * 2, name="a")
    make_tokens([[101 + i] * 25 for i in range(18)] + [[]] * 2, name="b")
    make_tokens([[5] * 40] * 2, name="v")

    def made(*names: str, **changes: object) -> DataConfig:
        paths = tuple(str(tmp_path / name) for name in names)
        options = {"source": "indexed", "validation_paths": (str(tmp_path / "v"),), "vocab_size": 1000}
        return DataConfig(paths=paths, cache_dir=str(tmp_path / "c"), **(options | changes))  # type: ignore[arg-type]

    return made


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_a_mixture_is_counted_in_its_samples(config: Callable[..., DataConfig], packing: str) -> None:
    data = open_data(config("a", "b", weights=(1.0, 3.0), packing=packing), seq_len=31, seed=1)
    found = uses(data.train, 200, 31)
    assert [one.name.rsplit("/")[-1] for one in found] == ["a", "b"]
    assert [(one.documents, one.tokens) for one in found] == [(28, 219), (18, 450)]
    assert [one.weight for one in found] == [0.25, 0.75]
    real = [0, 0]
    for sample in range(200):
        window = data.train.window(sample)
        tokens = window.tokens[: 32 - window.padding]
        real[int(tokens[0] > 100)] += len(tokens) - (packing == "stream")
    for one, count in zip(found, real, strict=True):
        # In the middle of an epoch the samples read may be fuller or less full than the others.
        assert abs(one.drawn - count) <= (0 if packing == "stream" else 0.02 * count)
        assert one.epochs == pytest.approx(one.drawn / one.tokens, rel=0.05)
        assert (one.padding > 0) == (packing == "documents")


def test_one_source_and_its_lines(config: Callable[..., DataConfig]) -> None:
    data = open_data(config("b"), seq_len=30, seed=1)
    (found,) = uses(data.train, 2_000_000, 30)
    assert (found.weight, found.drawn) == (1.0, 60_000_000)
    lines = table([found])
    assert lines[0].split("  ")[0].strip() == "data" and lines[0].endswith("epochs") and len({*map(len, lines)}) == 1
    assert lines[1].split()[1:] == ["18", "450", "100.0%", "60,000,000", "142,857"]
    packed = uses(open_data(config("b", packing="documents"), seq_len=30, seed=1).train, 9, 30)
    lines = table(packed)
    assert lines[0].endswith("padding") and lines[1].endswith("19.4%")  # one document of 25 in 31 places
    assert packed[0].drawn == 225 and packed[0].epochs == 0.5


def test_padding_counts_what_fim_adds(make_tokens: MakeTokens, tmp_path: Path) -> None:
    from tests.data.test_fim import _tokenizer, written

    config = written(_tokenizer(), tmp_path)
    plain, packed = (
        open_data(DataConfig(**{**vars(config), "packing": name}), seq_len=40, seed=1).train
        for name in ("stream", "documents")
    )
    real = sum(int(packed.window(i).padding) for i in range(len(packed)))
    (one,) = uses(packed, len(packed), 40)
    assert one.padding == pytest.approx(real / (41 * len(packed))) and one.epochs == 1.0
    assert one.drawn == 41 * len(packed) - real > one.tokens and len(plain)
