"""Messages between ranks in Triton: bit for bit the specification, for every width, routing and layout."""

import pytest
import torch

from fp8moe.kernels.fp8 import Fp8Tensor
from fp8moe.kernels.message import MessageLayout, pack_message, plan_message, unpack_message
from fp8moe.kernels.permute import plan_rows, unpermute
from fp8moe.kernels.quantize import quantize_rows
from fp8moe.kernels.reference import message as twin
from fp8moe.kernels.reference import permute as permutation
from tests.kernels.device_cases import assert_same, data
from tests.kernels.row_maps import PARTS, random_ids

WIDTHS = [16, 144, 576]


def assert_same_map(ours, theirs):
    for part in PARTS:
        one, other = getattr(ours, part), getattr(theirs, part)
        assert one.dtype is other.dtype and torch.equal(one, other), part
    assert (ours.num_rows, ours.topk) == (theirs.num_rows, theirs.topk)


def rows_of(kind, n, width, device):
    x = data("outliers", n, width, device=device)
    if kind == "fp8":
        rows = quantize_rows(x, power_of_two=True)
        rows.scale[n // 2, 0] = float("nan")
        rows.scale[n // 3, 0] = float("inf")
        return rows
    return x.float() if kind == "fp32" else x


@pytest.mark.parametrize("first", [0, 5])
@pytest.mark.parametrize(
    ("n", "topk", "peers", "span", "absent"),
    [
        (50, 8, 8, 4, 0.2),
        (37, 3, 6, 2, 0.4),
        (9, 5, 3, 7, 0.0),
        (1, 1, 1, 4, 0.0),
        (40, 4, 70, 1, 1.0),
        (0, 2, 3, 2, 0.0),
    ],
)
def test_the_plan_of_a_message_is_the_specification(triton_device, n, topk, peers, span, absent, first):
    ids = random_ids(n, topk, peers * span + 6, absent).to(triton_device)
    for given in (ids, ~ids.to(torch.int16), ids.t().contiguous().t()):
        for room, fixed in ((n * min(topk, peers), False), (n, False), (3 * peers, True), (40 * peers, True)):
            kind = {"room": room, "first": first, "fixed": fixed}
            expected = twin.plan_message(given, peers, span, **kind)
            assert_same_map(plan_message(given, peers, span, **kind), expected)


@pytest.mark.parametrize(("n", "topk", "absent"), [(50, 4, 0.3), (1, 1, 0.0), (300, 2, 0.0), (0, 3, 0.0)])
def test_a_plan_of_received_rows_is_the_specification(triton_device, n, topk, absent):
    ids = random_ids(n, topk, 12, absent).to(triton_device)
    order = torch.randperm(n).to(triton_device)
    for given in (ids, ~ids.to(torch.int16)):
        for kind in ({"first": 4}, {"first": -1}, {"order": order}, {"first": 2, "order": order, "room": 96}):
            expected = permutation.plan_rows(given, 6, align=16, **kind)
            assert_same_map(plan_rows(given, 6, align=16, **{"first": 0, **kind}), expected)


@pytest.mark.parametrize("kind", ["bf16", "fp32", "fp8"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("topk", [0, 3, 8])
def test_rows_are_packed_and_unpacked_as_specified(triton_device, width, kind, topk):
    n, peers = 50, 4
    rows = rows_of(kind, n, width, triton_device)
    ids = random_ids(n, topk or 3, 16, 0.2).to(triton_device)
    weights = torch.rand(n, topk or 3, device=triton_device)
    row_map = plan_message(ids, peers, 3, room=peers * 44, fixed=True)
    travelling = (ids, weights) if topk else (None, None)
    message = pack_message(rows, row_map, *travelling, sender=7)
    assert torch.equal(message, twin.pack_message(rows, row_map, *travelling, sender=7))
    layout = MessageLayout.of(rows, topk)
    arrived = ~random_ids(len(message), topk or 1, 10, 0.4).to(torch.int16).to(triton_device)
    to_experts = plan_rows(arrived, 6, align=16, room=len(message) * 3, first=0)
    got, got_weights = unpack_message(message, to_experts, layout)
    expected, expected_weights = twin.unpack_message(message, to_experts, layout)
    if isinstance(got, Fp8Tensor):
        assert_same(got, expected)
        assert got.data.is_contiguous() and got.scale.stride(0) == 1
    else:
        assert torch.equal(got, expected)
    assert (got_weights is None) == (not topk)
    assert got_weights is None or torch.equal(got_weights, expected_weights)


def test_rows_ids_and_weights_of_any_stride(triton_device):
    wide = data("normal", 50, 300, device=triton_device)
    ids = random_ids(50, 6, 16, 0.2).to(triton_device)
    row_map = plan_message(ids, 4, 4, room=40)
    scattered, weights = ids.t().contiguous().t(), torch.rand(6, 50, device=triton_device).t()
    for x in (wide[:, 8:152], wide[:, 1:65], wide[:, ::2], wide[:1].expand(50, 300), wide[:, :23]):
        expected = twin.pack_message(x, row_map, ids, weights)
        assert torch.equal(pack_message(x, row_map, scattered, weights), expected)
    fp8 = quantize_rows(wide[:, :144].contiguous(), power_of_two=True)
    token_major = Fp8Tensor(fp8.data, fp8.scale.contiguous())
    part = Fp8Tensor(torch.cat([fp8.data.view(torch.uint8)] * 2, 1).view(fp8.data.dtype)[:, :144], fp8.scale)
    for rows in (fp8, token_major, part):
        assert torch.equal(pack_message(rows, row_map, ids, weights), twin.pack_message(fp8, row_map, ids, weights))


def test_no_rows_and_no_room(triton_device):
    rows, ids = rows_of("fp8", 4, 144, triton_device), random_ids(4, 2, 8, 0.0).to(triton_device)
    none = plan_message(ids, 2, 4, room=0)
    message = pack_message(rows, none, ids, torch.rand(4, 2, device=triton_device))
    layout = MessageLayout.of(rows, 2)
    assert message.shape == (0, layout.row_bytes)
    got, weights = unpack_message(message, plan_rows(layout.ids_of(message), 2, room=128, first=0), layout)
    assert not bool(got.data.view(torch.uint8).any()) and bool((got.scale == 1).all()) and not bool(weights.any())
    empty = Fp8Tensor(rows.data[:0], rows.scale[:0])
    padded = plan_message(ids[:0], 2, 4, room=6, fixed=True)
    assert not bool(pack_message(empty, padded, ids[:0], torch.rand(0, 2, device=triton_device)).any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [16, 23, 2112])
def test_sums_are_written_between_other_values(triton_device, width, dtype):
    row_map = plan_rows(random_ids(40, 4, 6, 0.3).to(triton_device), 6, align=16)
    y = torch.randn(len(row_map.slot_R), width, device=triton_device).to(dtype)
    for start in (0, 1, 8):
        wide = torch.full((40, width + 17), 5.0, dtype=dtype, device=triton_device)
        unpermute(y, row_map, out=wide[:, start : start + width])
        assert torch.equal(wide[:, start : start + width], permutation.unpermute(y, row_map))
        assert bool((wide[:, :start] == 5).all()) and bool((wide[:, start + width :] == 5).all())
