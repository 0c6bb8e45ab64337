"""E5M6 by the specification: which numbers exist, how the nearest is chosen, where the bits lie, what Wgrad gets."""

import numpy as np
import pytest
import torch

from fp8moe.kernels import backend
from fp8moe.kernels.e5m6 import e5m6_to_columns, pack_e5m6, unpack_e5m6
from fp8moe.kernels.fp8 import E5m6Tensor
from fp8moe.kernels.gemm import gemm
from fp8moe.kernels.quantize import quantize_columns
from tests.distance import calc_diff
from tests.kernels.device_cases import KINDS, data


@pytest.fixture(autouse=True)
def specification():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    backend.set_backend("reference")
    yield
    backend.set_backend(None)
    torch.use_deterministic_algorithms(False)


def magnitudes():
    """Every positive number of the format, from its definition: bias 15, subnormals at exponent 0, none at 31."""
    code = np.arange(31 * 64)
    exponent, mantissa = code >> 6, code & 63
    return np.where(exponent == 0, mantissa * 2.0**-20, (1 + mantissa / 64) * 2.0 ** (exponent - 15.0))


def at_scale_one(values):
    """[rows, 128] of FP32, the last of each row 65024, whose tiles therefore have scale one."""
    run = torch.nn.functional.pad(values.float(), (0, -len(values) % 127)).view(-1, 127)
    return torch.cat([run, torch.full((len(run), 1), 65024.0)], dim=1)


def test_every_number_comes_back():
    values = torch.from_numpy(magnitudes())
    assert values.max() == 65024
    x = at_scale_one(torch.cat([values, -values]))
    packed = pack_e5m6(x)
    assert bool((packed.scale == 1).all()) and packed.shape == x.shape
    assert packed.data.dtype is torch.int32 and packed.data.shape == (len(x), 48)
    assert torch.equal(unpack_e5m6(packed, dtype=torch.float32), x)


def test_the_nearest_number_and_of_two_the_even_one():
    numbers = magnitudes()
    midpoints = (numbers[1:] + numbers[:-1]) / 2
    close = np.concatenate([numbers, midpoints]).astype(np.float32)
    tries = np.concatenate([close, np.nextafter(close, np.float32(0)), np.nextafter(close, np.float32(1e9))])
    tries = tries[tries <= 65024]
    below = np.searchsorted(numbers, tries, side="right") - 1
    above = np.minimum(below + 1, len(numbers) - 1)
    down, up = tries - numbers[below], numbers[above] - tries
    code = np.where((up < down) | ((up == down) & (below % 2 == 1)), above, below)
    for sign in (1, -1):
        x = at_scale_one(torch.from_numpy(sign * tries))
        got = unpack_e5m6(pack_e5m6(x), dtype=torch.float32)[:, :127].flatten()[: len(tries)]
        assert np.array_equal(got.numpy(), (sign * numbers[code]).astype(np.float32))


def test_bits_lie_from_the_lowest_up():
    x = torch.zeros(2, 16)
    x[:, 8:] = torch.tensor([65024.0, 1.0, -1.0, 2.0**-20, -0.0, 1.5, -65024.0, 0.0])
    codes = [0x7BF, 0x3C0, 0xBC0, 0x001, 0x800, 0x3E0, 0xFBF, 0x000]
    stream = sum(code << (12 * j) for j, code in enumerate(codes))
    words = pack_e5m6(x).data.numpy().view(np.uint32)
    assert words[1].tolist() == [0, 0, 0, *((stream >> (32 * w)) & 0xFFFFFFFF for w in range(3))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_scales_are_powers_of_two_and_errors_of_seven_bits(kind, dtype):
    x = data(kind, 3, 24, 208, device="cpu", dtype=dtype)
    packed = pack_e5m6(x)
    mantissa, _ = torch.frexp(packed.scale)
    assert packed.scale.shape == (3, 24, 2) and bool((mantissa == 0.5).all())
    y = unpack_e5m6(packed, dtype=torch.float32)
    assert bool(((y - x.float()).abs() <= x.float().abs() * 2.0**-7 * 1.0001).all())
    amax = x.float()[..., :128].abs().amax(-1)
    assert bool((amax / packed.scale[..., 0] <= 65024).all() and (amax / packed.scale[..., 0] > 65024 / 2).all())
    assert torch.equal(unpack_e5m6(packed), y.bfloat16())


def test_tiny_zero_and_not_finite():
    x = torch.zeros(32, 272)
    x[1], x[2, 5], x[3, 200] = 1e-30, float("nan"), float("inf")
    y = unpack_e5m6(pack_e5m6(x), dtype=torch.float32)
    assert not bool(y[:2].any()) and not bool(y[2, 128:].any()) and not bool(y[3, :128].any())
    assert not bool(y[2, :128].isfinite().any()) and not bool(y[3, 128:256].isfinite().any())


@pytest.mark.parametrize("kind", KINDS)
def test_columns_for_wgrad(kind):
    x, dy = data(kind, 272, 144, device="cpu"), data("normal", 272, 64, device="cpu")
    packed = pack_e5m6(x)
    columns, exact = e5m6_to_columns(packed), unpack_e5m6(packed, dtype=torch.float32)
    mantissa, _ = torch.frexp(columns.scale)
    assert columns.shape == (144, 272) and bool((mantissa == 0.5).all())
    out = gemm(quantize_columns(dy), columns, out_dtype=torch.float32)
    assert calc_diff(out, dy.double().T @ x.double(), dy.double().T, x.double().T) <= 2e-3
    assert calc_diff(columns.dequantize(), exact.T) <= 1e-3


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="K=40"):
        pack_e5m6(torch.zeros(2, 40))
    with pytest.raises(ValueError, match="float16"):
        pack_e5m6(torch.zeros(2, 48, dtype=torch.float16))
    packed = pack_e5m6(torch.zeros(2, 3, 48))
    with pytest.raises(ValueError, match="3 dims"):
        e5m6_to_columns(packed)
    with pytest.raises(ValueError, match="M=3"):
        e5m6_to_columns(E5m6Tensor(packed.data[0], packed.scale[0]))
    with pytest.raises(ValueError, match="float64"):
        unpack_e5m6(packed, dtype=torch.float64)
    with pytest.raises(ValueError, match="amax_floor=1e-30 must be at least 1e-29 for E5M6"):
        pack_e5m6(torch.zeros(2, 48), amax_floor=1e-30)
    with pytest.raises(ValueError, match="at least 1e-30 for E4M3"):
        e5m6_to_columns(pack_e5m6(torch.zeros(16, 48)), amax_floor=0.0)
    assert unpack_e5m6(pack_e5m6(torch.zeros(0, 48))).shape == (0, 48)
