"""Permute, unpermute and their plan in Triton: bit for bit the specification, for every width, routing and layout."""

from dataclasses import replace

import pytest
import torch

from fp8moe.kernels.fp8 import GRADIENT_AMAX_FLOOR, Fp8Tensor
from fp8moe.kernels.permute import permute, permute_quantize, plan_rows, unpermute
from fp8moe.kernels.quantize import quantize_rows
from fp8moe.kernels.reference import permute as twin
from fp8moe.kernels.row_map import invert
from fp8moe.kernels.triton import permute as ops
from tests.kernels.device_cases import assert_same, data
from tests.kernels.row_maps import PARTS, random_ids, record_waits

WIDTHS = [16, 144, 576, 2112]
DTYPES = [torch.bfloat16, torch.float32]


def assert_same_map(ours, theirs):
    for part in PARTS:
        one, other = getattr(ours, part), getattr(theirs, part)
        assert one.dtype is other.dtype and torch.equal(one, other), part
    assert (ours.num_rows, ours.topk) == (theirs.num_rows, theirs.topk)


def some_map(device, n=50, *, align=16, room=None, topk=4, absent=0.3):
    return plan_rows(random_ids(n, topk, max(6, topk), absent).to(device), max(6, topk), align=align, room=room)


def bits(x):
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize(
    ("n", "topk", "num_experts", "absent", "align"),
    [
        *((0, 2, 3, 0.0, 128), (1, 1, 1, 0.0, 128), (1, 1, 1, 1.0, 128), (37, 3, 6, 0.0, 1), (37, 3, 6, 0.4, 8)),
        *((37, 3, 6, 1.0, 128), (300, 4, 70, 0.4, 128), (9, 8, 130, 0.2, 1)),
    ],
)
def test_the_plan_is_the_specification(triton_device, n, topk, num_experts, absent, align):
    ids = random_ids(n, topk, num_experts, absent).to(triton_device)
    expected = twin.plan_rows(ids, num_experts, align=align)
    assert_same_map(plan_rows(ids, num_experts, align=align), expected)
    exact = len(expected.slot_R)
    for room in (exact + 200, exact // 2, 0):
        assert_same_map(
            plan_rows(ids, num_experts, align=align, room=room),
            twin.plan_rows(ids, num_experts, align=align, room=room),
        )


def test_more_blocks_of_copies_than_are_scanned_at_once(triton_device, monkeypatch):
    monkeypatch.setattr(ops, "PLAN_BLOCKS", 4)
    ids = random_ids(250, 4, 6, 0.2).to(triton_device)
    assert_same_map(plan_rows(ids, 6), twin.plan_rows(ids, 6))


def test_ids_of_any_stride_and_all_of_one_expert(triton_device):
    ids = random_ids(40, 4, 6, 0.2).to(triton_device)
    for view in (ids.t().contiguous().t(), ids[::2, 1:], torch.full_like(ids, 5), ids[:1].expand(9, 4)):
        assert_same_map(plan_rows(view, 6), twin.plan_rows(view, 6))


def test_ids_that_no_expert_has_are_not_placed(triton_device):
    """On a GPU they can't be refused without waiting: such a copy is absent, and memory stays whole."""
    ids = torch.tensor([[0, 7], [2**32, 1], [-(2**40), 2]], device=triton_device)
    row_map = ops.plan_rows(ids, 3, align=1)
    assert row_map.slot_R.tolist() == [0, 3, 5] and row_map.tokens_per_expert.tolist() == [1, 1, 1]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.uint8])
@pytest.mark.parametrize("width", [16, 23, 576])
def test_rows_of_every_kind_are_copied(triton_device, dtype, width):
    row_map = some_map(triton_device, align=8)
    x = (torch.randn(50, width, device=triton_device) * 100).to(dtype)
    assert torch.equal(permute(x, row_map), twin.permute(x, row_map))
    numbers = x[:, 0]
    assert torch.equal(permute(numbers, row_map), twin.permute(numbers, row_map))


def test_rows_of_any_stride_and_alignment(triton_device):
    row_map = some_map(triton_device)
    wide = torch.randn(50, 300, device=triton_device).bfloat16()
    bytes_ = wide.view(torch.uint8)
    for view in (wide[:, 8:152], wide[:, 1:65], wide[:, ::2], wide[:, :50].t(), wide[:1].expand(50, 300)):
        assert torch.equal(permute(view, row_map), twin.permute(view, row_map))
    for start in (0, 1, 2, 4, 8):
        view = bytes_[:, start : start + 272]
        assert torch.equal(permute(view, row_map), twin.permute(view, row_map))
    deep = torch.randn(50, 3, 5, device=triton_device)
    assert torch.equal(permute(deep, row_map), twin.permute(deep, row_map))


@pytest.mark.parametrize("width", WIDTHS)
def test_fp8_rows_move_with_their_scales(triton_device, width):
    row_map = some_map(triton_device, room=352)
    x = quantize_rows(data("outliers", 50, width, device=triton_device))
    token_major = Fp8Tensor(x.data, x.scale.contiguous())
    strided = Fp8Tensor(torch.cat([x.data.view(torch.uint8)] * 2, 1).view(x.data.dtype)[:, :width], x.scale)
    expected = twin.permute(token_major, row_map)
    for source in (x, token_major, strided):
        rows = permute(source, row_map)
        assert_same(rows, expected)
        assert rows.data.is_contiguous() and rows.scale.stride(0) == 1
    padding = row_map.slot_R < 0
    assert bool(padding[-1]) and not bool(bits(rows.data)[padding].any()) and bool((rows.scale[padding] == 1).all())


def test_scales_of_every_value_survive(triton_device):
    row_map = some_map(triton_device)
    codes = torch.arange(50 * 128, device=triton_device).to(torch.uint8).view(50, 128).view(torch.float8_e4m3fn)
    scale = torch.randn(50, 1, device=triton_device)
    scale[3], scale[7], scale[9] = float("nan"), float("inf"), 0.0
    assert_same(permute(Fp8Tensor(codes, scale), row_map), twin.permute(Fp8Tensor(codes, scale), row_map))


@pytest.mark.parametrize(
    ("width", "dtype", "power_of_two"),
    [
        *((16, torch.bfloat16, True), (144, torch.float32, True), (144, torch.bfloat16, False)),
        *((576, torch.float32, False), (2112, torch.bfloat16, True)),
    ],
)
def test_a_cast_on_the_way_is_the_cast_before_it(triton_device, width, dtype, power_of_two):
    row_map = some_map(triton_device, 40, align=8, room=232)
    x = data("outliers", 40, width, device=triton_device, dtype=dtype)
    rows = permute_quantize(x, row_map, power_of_two=power_of_two)
    assert_same(rows, twin.permute_quantize(x, row_map, power_of_two=power_of_two))
    assert_same(rows, permute(quantize_rows(x, power_of_two=power_of_two), row_map))
    assert rows.data.is_contiguous() and rows.scale.stride(0) == 1


def test_a_cast_of_gradients_and_of_any_stride(triton_device):
    row_map = some_map(triton_device, 40, align=8)
    wide = data("normal", 40, 300, device=triton_device) * 2.0**-40
    for view in (wide[:, 3:147], wide[:, ::2][:, :144], wide[:, :40].t()[:, :32], wide[:1].expand(40, 300)[:, :144]):
        ours = permute_quantize(view, row_map, amax_floor=GRADIENT_AMAX_FLOOR)
        assert_same(ours, twin.permute_quantize(view.contiguous(), row_map, amax_floor=GRADIENT_AMAX_FLOOR))
        assert bool((bits(ours.data) & 0x7F).any())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [*WIDTHS, 23])
def test_copies_are_summed_in_slot_order_and_rounded_once(triton_device, width, dtype):
    row_map = some_map(triton_device)
    y = torch.randn(len(row_map.slot_R), width, device=triton_device) * torch.exp2(
        torch.randint(-12, 12, (len(row_map.slot_R), width), device=triton_device).float()
    )
    y = y.to(dtype)
    y[row_map.slot_R < 0] = float("nan")
    expected = twin.unpermute(y, row_map)
    assert torch.equal(bits(unpermute(y, row_map)), bits(expected))
    exact = torch.zeros(50, width, dtype=torch.float64, device=triton_device)
    here = row_map.slot_R >= 0
    exact.index_add_(0, row_map.source_R[here], y[here].double())
    tolerance = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-20}[dtype]
    magnitude = torch.zeros_like(exact).index_add_(0, row_map.source_R[here], y[here].double().abs())
    assert bool(((expected.double() - exact).abs() <= tolerance * magnitude).all())


def test_sums_of_any_stride(triton_device):
    row_map = some_map(triton_device)
    wide = torch.randn(len(row_map.slot_R), 100, device=triton_device).bfloat16()
    for view in (wide[:, 8:40], wide[:, 1:34], wide[:, ::2], wide[:1].expand(wide.shape)):
        assert torch.equal(unpermute(view, row_map), twin.unpermute(view, row_map))
    other = torch.randn(20, len(row_map.slot_R), device=triton_device).t()
    assert torch.equal(unpermute(other, row_map), twin.unpermute(other, row_map))


@pytest.mark.parametrize("topk", range(1, 9))
def test_unpermute_is_the_dual_of_permute(triton_device, topk):
    """Exactly so: these sums of small whole numbers round nowhere."""
    row_map = some_map(triton_device, 13, topk=topk, align=8, room=192)
    x = torch.randint(-8, 9, (13, 64), device=triton_device).bfloat16()
    y = torch.randint(-8, 9, (192, 64), device=triton_device).bfloat16()
    forward = (permute(x, row_map).double() * y.double()).sum()
    assert torch.equal(forward, (x.double() * unpermute(y, row_map).double()).sum()) and bool(forward != 0)
    assert torch.equal(unpermute(y, row_map), twin.unpermute(y, row_map))


def test_a_map_whose_rows_were_reordered(triton_device):
    """As the dispatchers make them: rows of x, and with them slots, renumbered."""
    row_map = some_map(triton_device)
    order = torch.randperm(50).to(triton_device)
    here = row_map.slot_R >= 0
    source = torch.where(here, order[row_map.source_R], -1)
    slot = torch.where(here, source * 4 + row_map.slot_R % 4, -1)
    mixed = replace(row_map, source_R=source, slot_R=slot, row_of_slot=invert(slot, 200))
    x = data("normal", 50, 144, device=triton_device)
    copies = permute(x, mixed)
    assert torch.equal(copies, twin.permute(x, mixed))
    assert_same(permute_quantize(x, mixed), twin.permute_quantize(x, mixed))
    assert torch.equal(unpermute(copies, mixed), twin.unpermute(copies, mixed))


@pytest.mark.parametrize(("n", "room"), [(0, None), (0, 24), (1, None), (5, 0), (5, 24)])
@pytest.mark.parametrize("absent", [0.0, 1.0])
def test_nothing_or_nearly_nothing_to_move(triton_device, n, room, absent):
    row_map = some_map(triton_device, n, room=room, topk=2, absent=absent)
    x = data("normal", n, 48, device=triton_device) if n else torch.empty(0, 48, device=triton_device).bfloat16()
    copies, rows = permute(x, row_map), quantize_rows(x)
    assert torch.equal(copies, twin.permute(x, row_map))
    assert_same(permute(rows, row_map), twin.permute(rows, row_map))
    assert_same(permute_quantize(x, row_map), twin.permute_quantize(x, row_map))
    assert torch.equal(unpermute(copies, row_map), twin.unpermute(copies, row_map))
    assert permute(x[:, :0], row_map).shape == (len(row_map.slot_R), 0)
    assert unpermute(copies[:, :0], row_map).shape == (n, 0)


def test_the_plan_never_waits_where_the_room_is_given(triton_device):
    ids = random_ids(37, 3, 6, 0.3).to(triton_device)
    with record_waits() as waits:
        ops.plan_rows(ids, 6, room=1000)
    assert waits == []
    with record_waits() as waits:
        ops.plan_rows(ids, 6)
    assert len(waits) == 1


def test_blocks_fit_the_width():
    assert ops.copy_block(1792, 4) == (16, 256) and ops.copy_block(144, 4) == (16, 256)
    assert ops.copy_block(4, 4) == (128, 32) and ops.copy_block(5000, 1) == (4, 1024)
    assert ops.sum_block(7168) == (1, 1024) and ops.sum_block(576) == (1, 1024) and ops.sum_block(3) == (64, 16)
