"""One stream of samples whatever the ranks, the batch sizes and the interruptions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fp8moe.data.indexed import IndexedDataset
from fp8moe.data.packing import PackedDataset, every_document
from fp8moe.data.sampler import Sampler, rank_slice
from fp8moe.errors import ConfigError, DataError

SCHEDULE = [4, 4, 8, 8, 12, 16, 16, 24]  # global batch sizes: 92 samples, over several epochs of the set below


@pytest.fixture
def dataset(make_tokens: Callable[..., IndexedDataset], tmp_path: Path) -> PackedDataset:
    random = np.random.RandomState(0)
    source = make_tokens([random.randint(0, 1000, random.randint(1, 40)) for _ in range(30)])
    options = {"seq_len": 16, "seed": 5, "vocab_size": 1000, "document_mask": False, "cache": tmp_path / "c"}
    return PackedDataset(source, every_document(source), **options)  # type: ignore[arg-type]


def stream(dataset: PackedDataset, sampler: Sampler, ranks: int, batches: list[int]) -> torch.Tensor:
    """All tokens in the order of the global stream, each rank fetching its own share."""
    rows = []
    for size in batches:
        ids = sampler.next_indices(size)
        rows += [dataset.batch(rank_slice(ids, rank, ranks)).inputs_BS for rank in range(ranks)]
    return torch.cat(rows)


def test_the_stream_is_the_same_for_any_ranks_and_batch_sizes(dataset: PackedDataset) -> None:
    assert len(dataset) < sum(SCHEDULE) / 2  # more than one epoch is read
    expected = torch.cat([dataset.batch([n]).inputs_BS for n in range(92)])
    for ranks in (1, 2, 4):
        assert torch.equal(stream(dataset, Sampler(len(dataset), 5), ranks, SCHEDULE), expected)
    assert torch.equal(stream(dataset, Sampler(len(dataset), 5), 2, [2] * 46), expected)


@pytest.mark.parametrize("steps", range(len(SCHEDULE) + 1))
def test_a_resume_in_the_middle_changes_nothing(dataset: PackedDataset, steps: int) -> None:
    before = Sampler(len(dataset), 5)
    first = stream(dataset, before, 4, SCHEDULE[:steps]) if steps else torch.empty(0, 16, dtype=torch.int64)
    state = json.loads(json.dumps(before.state_dict()))
    assert state == {"seed": 5, "consumed": sum(SCHEDULE[:steps])}
    after = Sampler(len(dataset), 5)
    after.load_state_dict(state)
    rest = stream(dataset, after, 1, SCHEDULE[steps:]) if steps < len(SCHEDULE) else first[:0]
    assert torch.equal(torch.cat([first, rest]), stream(dataset, Sampler(len(dataset), 5), 2, SCHEDULE))


def test_epochs() -> None:
    sampler = Sampler(10, seed=0)
    epochs = []
    for _ in range(6):
        epochs.append(sampler.epoch)
        sampler.next_indices(4)
    assert epochs == [0, 0, 0, 1, 1, 2]
    assert Sampler(10, 0, consumed=10**12).next_indices(2) == [10**12, 10**12 + 1]


def test_impossible_requests() -> None:
    with pytest.raises(DataError, match="got 0"):
        Sampler(0, seed=0)
    with pytest.raises(ConfigError, match="consumed=-1"):
        Sampler(3, seed=0, consumed=-1)
    with pytest.raises(ConfigError, match="global_batch=0"):
        Sampler(3, seed=0).next_indices(0)
    with pytest.raises(ConfigError, match=r"seed 1 and this run has seed 2: use seed=1"):
        Sampler(3, seed=2).load_state_dict({"seed": 1, "consumed": 0})
    with pytest.raises(ConfigError, match="consumed -4 samples"):
        Sampler(3, seed=1).load_state_dict({"seed": 1, "consumed": -4})
    with pytest.raises(ConfigError, match="10 samples can't be shared by 4 ranks: use 8 or 12"):
        rank_slice(list(range(10)), 0, 4)
    with pytest.raises(ConfigError, match="3 samples can't be shared by 4 ranks: use 4"):
        rank_slice(list(range(3)), 0, 4)
