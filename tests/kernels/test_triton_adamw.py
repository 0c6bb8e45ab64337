"""AdamW in Triton: bit for bit correctly rounded FP32, at any range of a flat buffer, and blocks of the new weight."""

import itertools

import pytest
import torch

from fp8moe.kernels.adamw import adamw_step, adamw_step_quantize
from fp8moe.kernels.fp8 import ACTIVATION_AMAX_FLOOR
from fp8moe.kernels.quantize import quantize_blocks
from fp8moe.kernels.reference import adamw as twin
from fp8moe.kernels.reference import quantize as casts
from fp8moe.kernels.segments import PART, Segments
from tests.kernels.device_cases import assert_same
from tests.kernels.updates import SETTINGS, assert_near, state, update_exactly

KINDS = [(torch.bfloat16, True), (torch.float32, False), (torch.float32, True)]  # moments, whether there is a weight


def updated(tensors, segments, weight, scale, settings):
    """(master, exp_avg, exp_avg_sq) of correctly rounded arithmetic, and where the segments are."""
    inside = torch.zeros(len(tensors[0]), dtype=torch.bool)
    expected = [tensors[i].cpu().clone() for i in (0, 2, 3)]
    for start, stop, decays in segments.spans:
        part = [tensor[start:stop] for tensor in tensors]
        decay = settings["weight_decay"] if decays else 0.0
        exact = update_exactly(*part, **{**settings, "weight_decay": decay}, grad_scale=scale)
        for target, value in zip(expected, exact, strict=True):
            target[start:stop] = value
        inside[start:stop] = True
    return expected, inside


def check_flat(device, moments, has_weight, beta1=0.9, cuts=(0, 3 * PART + 77)):
    """Segments that begin and end anywhere, in shards from one of `cuts` to the next."""
    n = 3 * PART + 77
    spans = [(3, 700, True), (700, 704, False), (704, PART + 100, True), (PART + 101, n - 5, False)]
    tensors, segments = state(n, moments=moments, device=device), Segments.of(spans, device)
    weight = torch.full((n,), 7.0, dtype=torch.bfloat16, device=device) if has_weight else None
    settings, scale = {**SETTINGS, "beta1": beta1}, torch.tensor(0.37, device=device)
    expected, inside = updated(tensors, segments, weight, scale, settings)
    for a, b in itertools.pairwise(cuts):
        shard = [tensor[a:b] for tensor in tensors]
        mine = None if weight is None else weight[a:b]
        adamw_step(*shard, segments.within(a, b), mine, **settings, grad_scale=scale)
    for got, wanted in zip((tensors[0], tensors[2], tensors[3]), expected, strict=True):
        assert torch.equal(got.cpu(), wanted)
    if weight is not None:
        assert torch.equal(weight.cpu()[inside], expected[0].bfloat16()[inside]) and bool(
            (weight.cpu()[~inside] == 7).all()
        )


def check_blocks(device, shape, moments):
    tensors = state(*shape, moments=moments, device=device)
    expected = update_exactly(*tensors, **SETTINGS)
    weight = torch.empty(shape, dtype=torch.bfloat16, device=device)
    blocks = quantize_blocks(torch.zeros(shape, device=device))
    adamw_step_quantize(*tensors, weight, *blocks, **SETTINGS)
    for got, wanted in zip((tensors[0], tensors[2], tensors[3]), expected, strict=True):
        assert torch.equal(got.cpu(), wanted)
    assert torch.equal(weight.cpu(), expected[0].bfloat16())
    for got, wanted in zip(blocks, casts.quantize_blocks(weight), strict=True):
        assert_same(got, wanted)


@pytest.mark.parametrize(("moments", "has_weight"), KINDS)
def test_flat_buffers_are_updated_to_the_bit(triton_device, moments, has_weight):
    check_flat(triton_device, moments, has_weight)


@pytest.mark.parametrize("beta1", [0.5, 0.3, 0.0])
def test_a_small_beta1_interpolates_from_the_gradient(triton_device, beta1):
    check_flat(triton_device, torch.bfloat16, True, beta1=beta1)


def test_any_range_of_the_buffers_may_be_a_shard(triton_device):
    check_flat(triton_device, torch.bfloat16, True, cuts=(0, 701, PART + 102, 2 * PART + 16, 3 * PART + 77))


@pytest.mark.parametrize("moments", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 144, 272), (128, 128), (16, 48)])
def test_blocks_are_those_of_the_weight_written_beside(triton_device, shape, moments):
    check_blocks(triton_device, shape, moments)


def test_the_specification_differs_by_a_rounding(triton_device):
    ours, theirs = (state(5000, moments=torch.float32, device=device) for device in (triton_device, "cpu"))
    before, segments = [theirs[i].clone() for i in (0, 2, 3)], Segments.of([(0, 5000, True)], triton_device)
    adamw_step(*ours, segments, **SETTINGS)
    twin.adamw_step(*theirs, segments, **SETTINGS)
    assert_near([ours[i] for i in (0, 2, 3)], [theirs[i] for i in (0, 2, 3)], before, theirs[1])


def test_nothing_to_update(triton_device):
    empty = state(0, device=triton_device)
    adamw_step(*empty, Segments.of([], triton_device), **SETTINGS)
    tensors = state(300, device=triton_device)
    adamw_step(*tensors, Segments.of([], triton_device), **SETTINGS)
    for got, kept in zip(tensors, state(300), strict=True):
        assert torch.equal(got.cpu(), kept)
    shape = (0, 16, 32)
    blocks = quantize_blocks(torch.zeros(shape, device=triton_device), amax_floor=ACTIVATION_AMAX_FLOOR)
    weight = torch.empty(shape, dtype=torch.bfloat16, device=triton_device)
    adamw_step_quantize(*state(*shape, device=triton_device), weight, *blocks, **SETTINGS)
