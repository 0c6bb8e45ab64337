"""Plan, permute and unpermute against plain loops; duality; padding; copies that are not here."""

import pytest
import torch

from fp8moe.kernels.fp8 import GRADIENT_AMAX_FLOOR, Fp8Tensor
from fp8moe.kernels.permute import RowMap, permute, permute_quantize, plan_rows, unpermute
from fp8moe.kernels.quantize import quantize_blocks, quantize_rows
from fp8moe.kernels.reference import permute as reference
from fp8moe.kernels.row_map import invert, most_rows
from fp8moe.kernels.statistics import observe_casts
from tests.kernels.device_cases import data
from tests.kernels.operands import codes, quantize_matrix
from tests.kernels.row_maps import PARTS, random_ids, record_waits


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
    rows = [slot.index(s) if s in slot else -1 for s in range(n * topk)]
    assert row_map.row_of_slot.tolist() == rows and row_map.row_of_slot.dtype is torch.int32
    assert torch.equal(invert(row_map.slot_R, n * topk), row_map.row_of_slot)


@pytest.mark.parametrize("num_experts, copies", [(1, 1), (3, 2), (4, 300), (7, 128 * 7), (32, 1000)])
def test_the_most_rows_suffice_and_can_be_needed(num_experts: int, copies: int) -> None:
    room = most_rows(copies, num_experts)
    groups = min(copies, num_experts)
    worst = [1] * (groups - 1) + [copies - groups + 1]  # as many groups as there can be, each with one copy too many
    spread = torch.arange(copies) % num_experts
    for ids in (spread, torch.arange(groups).repeat_interleave(torch.tensor(worst)), torch.zeros_like(spread)):
        assert len(plan_rows(ids[:, None], num_experts).slot_R) <= room
    assert most_rows(copies, num_experts, align=1) == copies
    whole = (copies - groups) // 128 * 128  # an expert more rows than the rest of one tile each
    needed = [1] * (groups - 1) + [whole + 1]
    rows = len(plan_rows(torch.arange(groups).repeat_interleave(torch.tensor(needed))[:, None], num_experts).slot_R)
    assert rows == most_rows(sum(needed), num_experts)


@pytest.mark.parametrize("align", [1, 128])
def test_room_pads_behind_the_last_group_and_cuts_what_reaches_past_it(align: int) -> None:
    ids = random_ids(60, 3, 6, 0.3)
    exact = plan_rows(ids, 6, align=align)
    r = len(exact.slot_R)
    wide, narrow = plan_rows(ids, 6, align=align, room=r + 77), plan_rows(ids, 6, align=align, room=r // 2)
    for part in PARTS:
        full, more, less = (getattr(row_map, part) for row_map in (exact, wide, narrow))
        if part == "row_of_slot":
            assert torch.equal(more, full) and torch.equal(less, full.masked_fill(full >= r // 2, -1))
        elif part.endswith("_R"):
            assert torch.equal(more[:r], full) and bool((more[r:] == -1).all()) and len(more) == r + 77
            assert torch.equal(less, full[: r // 2])
        else:
            assert torch.equal(more, full)
            assert torch.equal(less, full.clamp(max=r // 2) if part == "group_offsets" else full)


def test_no_step_waits_for_the_device_where_the_room_is_given() -> None:
    ids, x = random_ids(37, 3, 6, 0.3), torch.randn(37, 48)
    with record_waits() as waits:
        row_map = reference.plan_rows(ids, 6, room=1000)
        reference.permute_quantize(x, row_map)
        reference.unpermute(reference.permute(x, row_map), row_map)
    assert waits == []
    with record_waits() as waits:
        reference.plan_rows(ids, 6)
    assert len(waits) == 1


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


@pytest.mark.parametrize("topk", range(1, 9))
def test_permute_and_unpermute_are_duals(topk: int) -> None:
    """Exactly: sums of small whole numbers round nowhere."""
    row_map = plan_rows(random_ids(50, topk, 9, 0.3), 9, room=50 * topk + 9 * 128)
    x = torch.randint(-8, 9, (50, 16)).float()
    y = torch.randint(-8, 9, (len(row_map.slot_R), 16)).float()
    forward = (permute(x, row_map).double() * y.double()).sum()
    assert torch.equal(forward, (x.double() * unpermute(y, row_map).double()).sum()) and bool(forward != 0)


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


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("k", [16, 576, 2112])
def test_a_cast_on_the_way(k: int, power_of_two: bool) -> None:
    """Each copy has the codes and scales of its row, by a quantizer that shares no code with the project's."""
    row_map = plan_rows(random_ids(9, 2, 6, 0.3), 6, align=8, room=60)
    x = data("outliers", 9, k)
    expected, scale = quantize_matrix(x, (1, 128), 1e-4, power_of_two)
    rows = permute_quantize(x, row_map, power_of_two=power_of_two)
    for r, source in enumerate(row_map.source_R.tolist()):
        nothing = torch.zeros(k, dtype=torch.uint8), torch.ones(scale.shape[1])
        code, factor = nothing if source < 0 else (expected[source], scale[source])
        assert torch.equal(codes(rows)[r], code) and torch.equal(rows.scale[r], factor)


def test_a_cast_on_the_way_counts_each_row_once() -> None:
    row_map = some_map()
    x = torch.randn(50, 144) * 2.0**-36
    counted = []
    for cast in (lambda: quantize_rows(x), lambda: permute_quantize(x, row_map)):
        with observe_casts() as statistics:
            cast()
        counted.append((statistics.values, statistics.underflow_share, statistics.saturated_share))
    assert counted[0] == counted[1] and counted[0][0] == x.numel() and counted[0][1] > 0.9
    small = permute_quantize(x, row_map, amax_floor=GRADIENT_AMAX_FLOOR)
    assert bool((codes(small) & 0x7F).any())


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
    r = len(row_map.slot_R)
    cases = (
        (lambda: plan_rows(torch.zeros(4, 2), 3), "got torch.float32"),
        (lambda: plan_rows(torch.zeros(4, dtype=torch.int64), 3), r"\[4\]"),
        (lambda: plan_rows(torch.full((4, 2), 3), 3), "below num_experts=3, got 3"),
        (lambda: plan_rows(torch.zeros(4, 2, dtype=torch.int64), 3, align=0), "align must be at least 1, got 0"),
        (
            lambda: plan_rows(torch.zeros(4, 2, dtype=torch.int64), 0),
            "num_experts must be at least 1 and room at least 0, got 0 and None",
        ),
        (lambda: plan_rows(torch.zeros(4, 2, dtype=torch.int64), 3, room=-1), "got 3 and -1"),
        (lambda: permute(torch.zeros(49, 8), row_map), "num_rows=50 rows as the row map says, got 49"),
        (lambda: unpermute(torch.zeros(3, 8), row_map), rf"R={r} rows as the row map says, got 3"),
        (lambda: unpermute(torch.zeros(r), row_map), rf"BF16 or FP32 rows \[R, D\], not torch.float32 \[{r}\]"),
        (lambda: unpermute(torch.zeros(r, 8, dtype=torch.float64), row_map), "not torch.float64"),
        (lambda: permute(torch.zeros(()), row_map), "not one number"),
        (lambda: permute(torch.zeros(50, 8, device="meta"), row_map), "lies on cpu, the rows on meta"),
        (lambda: unpermute(torch.zeros(r, 8, device="meta"), row_map), "lies on cpu, the rows on meta"),
        (lambda: permute_quantize(torch.zeros(50, 24), row_map), "D=24 must be a multiple of 16"),
        (lambda: permute_quantize(torch.zeros(50, 16, dtype=torch.float16), row_map), "not torch.float16"),
        (lambda: permute_quantize(torch.zeros(50), row_map), r"\[50\]"),
        (lambda: permute_quantize(torch.zeros(49, 16), row_map), "num_rows=50 rows as the row map says, got 49"),
        (lambda: permute_quantize(torch.zeros(50, 16, device="meta"), row_map), "the rows on meta"),
        (lambda: permute(quantize_blocks(torch.zeros(48, 16))[0], row_map), r"of \(128, 128\)"),
    )
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
