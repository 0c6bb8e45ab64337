"""Plan, permute and unpermute against plain loops; duality; padding; copies that are not here."""

import pytest
import torch
from torch import Tensor

from fp8moe.kernels.fp8 import Fp8Tensor
from fp8moe.kernels.permute import RowMap, permute, plan_rows, unpermute
from fp8moe.kernels.quantize import quantize_blocks, quantize_rows
from tests.kernels.operands import codes


def random_ids(n: int, topk: int, num_experts: int, absent: float) -> Tensor:
    """Distinct experts a row, the second expert never chosen, some copies not here."""
    scores = torch.rand(n, num_experts)
    scores[:, 1] = -1
    ids = scores.topk(topk, dim=1).indices
    return ids.masked_fill(torch.rand(n, topk) < absent, -1)


def plan_by_loop(ids: list[list[int]], num_experts: int, align: int) -> tuple[list[int], ...]:
    source, slot, offsets, counts = [], [], [0], []
    for e in range(num_experts):
        here = [(n, k) for n, row in enumerate(ids) for k, chosen in enumerate(row) if chosen == e]
        padding = -len(here) % align
        source += [n for n, _ in here] + [-1] * padding
        slot += [n * len(ids[0]) + k for n, k in here] + [-1] * padding
        offsets.append(len(source))
        counts.append(len(here))
    return source, slot, offsets, counts


@pytest.mark.parametrize("align", [1, 8, 128])
@pytest.mark.parametrize("absent", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("n, topk", [(1, 1), (37, 3), (300, 4)])
def test_plan_equals_a_loop(n: int, topk: int, absent: float, align: int) -> None:
    ids = random_ids(n, topk, 6, absent)
    row_map = plan_rows(ids, 6, align=align)
    source, slot, offsets, counts = plan_by_loop(ids.tolist(), 6, align)
    assert row_map.source_R.tolist() == source and row_map.slot_R.tolist() == slot
    assert row_map.group_offsets.tolist() == offsets and row_map.group_offsets.dtype is torch.int32
    assert row_map.tokens_per_expert.tolist() == counts and row_map.tokens_per_expert.dtype is torch.int64
    assert (row_map.num_rows, row_map.topk) == (n, topk)
    assert row_map.source_R.dtype is row_map.slot_R.dtype is torch.int64


def some_map(absent: float = 0.3) -> RowMap:
    return plan_rows(random_ids(50, 4, 6, absent), 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_permute_and_unpermute_equal_loops(dtype: torch.dtype) -> None:
    row_map = some_map()
    x = torch.randn(50, 24).to(dtype)
    permuted = permute(x, row_map)
    assert permuted.dtype is dtype
    for r, source in enumerate(row_map.source_R.tolist()):
        assert torch.equal(permuted[r], torch.zeros(24, dtype=dtype) if source < 0 else x[source])

    y = torch.randn(permuted.shape).to(dtype)
    y[row_map.source_R < 0] = float("nan")
    total = torch.zeros(50, 24)
    slots = row_map.slot_R.tolist()
    for slot in sorted(slot for slot in slots if slot >= 0):
        total[slot // 4] += y[slots.index(slot)].float()
    assert torch.equal(unpermute(y, row_map), total.to(dtype))


def test_permute_and_unpermute_are_duals() -> None:
    row_map = some_map()
    x, y = torch.randn(50, 16), torch.randn(row_map.source_R.shape[0], 16)
    forward = float((permute(x, row_map).double() * y.double()).sum())
    backward = float((x.double() * unpermute(y, row_map).double()).sum())
    assert forward == pytest.approx(backward, rel=1e-6)


def test_the_sum_is_taken_in_slot_order() -> None:
    ids = torch.tensor([[3, 0, 2, 1]])
    row_map = plan_rows(ids, 4, align=1)
    by_slot = torch.tensor([1e8, 1.0, -1e8, 1.0])
    y = torch.empty(4, 1)
    for r, slot in enumerate(row_map.slot_R.tolist()):
        y[r] = by_slot[slot]
    assert unpermute(y, row_map).item() == 1.0  # in expert order it would be 0.0 or 2.0


def test_fp8_rows() -> None:
    row_map = some_map()
    x = quantize_rows(torch.randn(50, 144))
    permuted = permute(x, row_map)
    padding = row_map.source_R < 0
    assert isinstance(permuted, Fp8Tensor) and permuted.tile == x.tile
    assert torch.equal(permuted.dequantize(), permute(x.dequantize(), row_map))
    assert not bool(codes(permuted)[padding].any()) and bool((permuted.scale[padding] == 1).all())


def test_one_number_a_row() -> None:
    row_map = some_map()
    weights = torch.rand(50)
    expected = torch.where(row_map.source_R < 0, 0, weights[row_map.source_R])
    assert torch.equal(permute(weights, row_map), expected)


def test_many_rows_are_summed_in_chunks() -> None:
    row_map = plan_rows(random_ids(3000, 2, 4, 0.1), 4)
    y = torch.randn(row_map.source_R.shape[0], 128)
    wide = unpermute(y, row_map)
    narrow = torch.cat([unpermute(column, row_map) for column in y.split(16, dim=1)], dim=1)
    assert torch.equal(wide, narrow)


@pytest.mark.parametrize("n", [0, 5])
def test_nothing_here(n: int) -> None:
    row_map = plan_rows(torch.full((n, 2), -1), 3)
    assert row_map.group_offsets.tolist() == [0, 0, 0, 0] and row_map.tokens_per_expert.tolist() == [0, 0, 0]
    permuted = permute(torch.randn(n, 16), row_map)
    assert permuted.shape == (0, 16)
    assert torch.equal(unpermute(permuted, row_map), torch.zeros(n, 16))
    assert permute(quantize_rows(torch.randn(n, 16)), row_map).shape == (0, 16)


def test_wrong_arguments() -> None:
    row_map = some_map()
    cases = (
        (lambda: plan_rows(torch.zeros(4, 2), 3), "not torch.float32"),
        (lambda: plan_rows(torch.zeros(4, dtype=torch.int64), 3), r"\[4\]"),
        (lambda: plan_rows(torch.full((4, 2), 3), 3), "end at 2, topk_ids hold 3"),
        (lambda: plan_rows(torch.zeros(4, 2, dtype=torch.int64), 3, align=0), "at least 1, not 0"),
        (lambda: permute(torch.zeros(49, 8), row_map), "num_rows=50, the tensor 49 rows"),
        (lambda: unpermute(torch.zeros(3, 8), row_map), "the tensor 3 rows"),
        (lambda: permute(quantize_blocks(torch.zeros(48, 16))[0], row_map), r"of \(128, 128\)"),
    )
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
