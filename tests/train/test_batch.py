"""Global batch sizes: which are legal, and how they grow."""

from __future__ import annotations

import pytest

from fp8moe.train.batch import BatchConfig, global_batch, pieces, resolve_batch

RAMP = BatchConfig(sequences=15360, micro_batch=1, ramp_from=3072, ramp_samples=114_501_953, increment=3072)


def test_the_published_ramp() -> None:
    assert global_batch(RAMP, 0) == 3072
    assert global_batch(RAMP, RAMP.ramp_samples // 2 + 1) == 9216
    assert global_batch(RAMP, RAMP.ramp_samples) == 15360
    sizes = [global_batch(RAMP, consumed) for consumed in range(0, RAMP.ramp_samples + 10**6, 10**6)]
    assert sizes == sorted(sizes)
    assert set(sizes) == {3072, 6144, 9216, 12288, 15360}
    resolve_batch(RAMP, dp=1024)


def test_a_micro_batch_is_a_ranks_share_unless_said() -> None:
    assert resolve_batch(BatchConfig(sequences=16), dp=4).micro_batch == 4
    assert resolve_batch(BatchConfig(sequences=16, micro_batch=2), dp=4).micro_batch == 2
    assert resolve_batch(BatchConfig(sequences=16, ramp_from=8, ramp_samples=9), dp=4).micro_batch == 2
    with pytest.raises(ValueError, match=r"batch.sequences=16 is no multiple .*= 3 x 5 = 15: use 15"):
        resolve_batch(BatchConfig(sequences=16), dp=3)
    with pytest.raises(ValueError, match=r"batch.sequences=2 is no multiple .*= 4 x 1 = 4: use 4"):
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
    ],
)
def test_impossible_sizes(settings: dict[str, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        BatchConfig(**settings)


def test_pieces_keep_the_order() -> None:
    assert [list(piece) for piece in pieces([1, 2, 3, 4, 5, 6], 2)] == [[1, 2], [3, 4], [5, 6]]
