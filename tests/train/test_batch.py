"""Global batch sizes: which are legal, and how they grow."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fp8moe.data.packing import Batch
from fp8moe.train.batch import BatchConfig, global_batch, microbatches_of, resolve_batch, to_device, total_samples

RAMP = BatchConfig(sequences=15360, micro_batch=1, ramp_from=3072, ramp_samples=114_501_953, increment=3072)


def test_the_published_ramp() -> None:
    assert global_batch(RAMP, 0) == 3072
    assert global_batch(RAMP, RAMP.ramp_samples // 2 + 1) == 9216
    assert global_batch(RAMP, RAMP.ramp_samples) == 15360
    sizes = [global_batch(RAMP, consumed) for consumed in range(0, RAMP.ramp_samples + 10**6, 10**6)]
    assert sizes == sorted(sizes)
    assert set(sizes) == {3072, 6144, 9216, 12288, 15360}
    resolve_batch(RAMP, dp=1024)


def test_a_ramp_grows_when_a_whole_increment_is_reached() -> None:
    # 4 + 12 x consumed / 100 sequences, rounded down to a multiple of 4: 8 from 33.3 on, 12 from 66.7 on.
    config = BatchConfig(sequences=16, micro_batch=1, ramp_from=4, ramp_samples=100, increment=4)
    sizes = {0: 4, 33: 4, 34: 8, 66: 8, 67: 12, 99: 12, 100: 16, 101: 16}
    assert {consumed: global_batch(config, consumed) for consumed in sizes} == sizes
    # Without an increment it grows by ramp_from; it never falls below that, nor beyond the full batch.
    assert global_batch(BatchConfig(sequences=16, ramp_from=8, ramp_samples=100), 99) == 8
    odd = BatchConfig(sequences=18, ramp_from=5, ramp_samples=130, increment=4)
    assert [global_batch(odd, consumed) for consumed in (0, 29, 30, 129, 130)] == [5, 5, 8, 16, 18]


def test_an_increment_may_be_below_the_micro_batches_that_a_schedule_needs() -> None:
    ramp = BatchConfig(sequences=16, micro_batch=1, ramp_from=8, ramp_samples=100, increment=2)
    assert resolve_batch(ramp, dp=1, least=4, multiple=2) == ramp
    with pytest.raises(ValueError, match=r"batch.increment=1 makes 1 micro-batches .*in multiples of 2: use 4"):
        resolve_batch(replace(ramp, increment=1), dp=1, least=4, multiple=2)
    with pytest.raises(ValueError, match=r"batch.ramp_from=2 makes 2 micro-batches .*needs at least 4, .*: use 4"):
        resolve_batch(replace(ramp, ramp_from=2), dp=1, least=4, multiple=2)
    # The exact number that is needed is enough.
    assert resolve_batch(BatchConfig(sequences=8, micro_batch=2), dp=1, least=4, multiple=2).micro_batch == 2


def test_a_micro_batch_is_the_largest_that_suits_the_schedule() -> None:
    for sequences, least, multiple, size in ((16, 4, 2, 4), (12, 4, 2, 3), (10, 4, 2, 1), (7, 2, 1, 1), (6, 2, 1, 3)):
        assert resolve_batch(BatchConfig(sequences), dp=1, least=least, multiple=multiple).micro_batch == size


def test_a_micro_batch_is_a_ranks_share_unless_said() -> None:
    assert resolve_batch(BatchConfig(sequences=16), dp=4).micro_batch == 4
    assert resolve_batch(BatchConfig(sequences=16, micro_batch=2), dp=4).micro_batch == 2
    assert resolve_batch(BatchConfig(sequences=16, ramp_from=8, ramp_samples=9), dp=4).micro_batch == 2
    with pytest.raises(ValueError, match=r"batch.sequences=16 must be a multiple .*= 3 x 5 = 15: use 15"):
        resolve_batch(BatchConfig(sequences=16), dp=3)
    with pytest.raises(ValueError, match=r"batch.sequences=2 must be a multiple .*= 4 x 1 = 4: use 4"):
        resolve_batch(BatchConfig(sequences=2), dp=4)


def test_no_ramp_is_one_size() -> None:
    assert {global_batch(BatchConfig(sequences=16, micro_batch=4), consumed) for consumed in range(0, 100, 7)} == {16}


@pytest.mark.parametrize(("sequences", "nearest"), [(6, 8), (12, 16), (1, 8), (17, 16)])
def test_a_batch_that_does_not_fill_the_ranks(sequences: int, nearest: int) -> None:
    with pytest.raises(ValueError, match=rf"batch.sequences={sequences} .*= 4 x 2 = 8: use {nearest}$"):
        resolve_batch(BatchConfig(sequences=sequences, micro_batch=2), dp=4)


def test_every_size_of_a_ramp_is_checked() -> None:
    with pytest.raises(ValueError, match=r"batch.ramp_from=4 .*use 8"):
        resolve_batch(BatchConfig(sequences=64, micro_batch=2, ramp_from=4, ramp_samples=100), dp=4)
    with pytest.raises(ValueError, match=r"batch.increment=12 .*use 16"):
        resolve_batch(BatchConfig(sequences=64, micro_batch=2, ramp_from=8, ramp_samples=100, increment=12), dp=4)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"sequences": 0, "micro_batch": 1}, "batch.sequences=0"),
        ({"sequences": 4, "micro_batch": 0}, "batch.micro_batch=0"),
        ({"sequences": 4, "micro_batch": 1, "ramp_from": 8, "ramp_samples": 10}, "ramp_from=8 exceeds"),
        ({"sequences": 4, "micro_batch": 1, "ramp_from": 2}, "needs batch.ramp_samples of at least 1, got 0"),
        ({"sequences": 4, "ramp_from": 0, "ramp_samples": 1}, "batch.ramp_from=0 must be at least 1"),
        ({"sequences": 4, "ramp_from": 2, "ramp_samples": 1, "increment": 0}, "batch.increment=0 must be at least 1"),
    ],
)
def test_impossible_sizes(settings: dict[str, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        BatchConfig(**settings)
    BatchConfig(sequences=1, micro_batch=1, ramp_from=1, ramp_samples=1, increment=1)


def test_micro_batches_keep_the_order() -> None:
    assert [list(ids) for ids in microbatches_of([1, 2, 3, 4, 5, 6], 2)] == [[1, 2], [3, 4], [5, 6]]


class Pageable:
    """Stands in for a tensor: notes how it goes to a device."""

    def __init__(self, *how: str) -> None:
        self.how = how

    def pin_memory(self) -> Pageable:
        return Pageable(*self.how, "pinned")

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Pageable:
        return Pageable(*self.how, f"to {device}", *["at once"] * non_blocking)


@pytest.mark.parametrize("lengths", [(3, 1), None])
def test_a_batch_goes_to_a_gpu_by_pinned_memory_without_a_wait(lengths: tuple[int, ...] | None) -> None:
    batch = Batch(Pageable(), Pageable(), Pageable(), lengths)  # type: ignore[arg-type]
    moved = to_device(batch, torch.device("cuda", 1))
    parts = [moved.inputs_BS, moved.labels_BS, moved.positions_BS]
    assert [part.how for part in parts] == [("pinned", "to cuda:1", "at once")] * 3  # type: ignore[attr-defined]
    assert moved.document_lengths == lengths  # host numbers, for launches


def test_a_batch_stays_on_a_cpu() -> None:
    batch = Batch(*torch.arange(3).expand(3, 1, 3), None)
    assert to_device(batch, torch.device("cpu")) is batch
    assert to_device(batch, torch.device("meta")).labels_BS.device.type == "meta"


@pytest.mark.parametrize("steps", [0, 1, 3, 7, 30])
@pytest.mark.parametrize("ramp", [{}, {"ramp_from": 4, "ramp_samples": 40, "increment": 2}])
def test_samples_of_a_run_are_those_of_its_steps(steps: int, ramp: dict[str, int]) -> None:
    config, consumed = BatchConfig(16, **ramp), 0
    for _ in range(steps):
        consumed += global_batch(config, consumed)
    assert total_samples(config, steps) == consumed
