"""The emulated tensor core: exact where 13 bits are enough, truncating where they are not, and what promotion cures."""

import pytest
import torch

from fp8moe.kernels.fp8 import E4M3, Fp8Tensor
from fp8moe.kernels.quantize import quantize_blocks, quantize_columns, quantize_rows
from tests.distance import calc_diff
from tests.kernels.device_cases import KINDS, data
from tests.kernels.tensor_core import emulated_gemm, tensor_core_dot


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def constant_scales(codes):
    return Fp8Tensor(codes.clamp(-448, 448).to(E4M3), torch.full((len(codes), codes.shape[1] // 128), 0.3))


def distance(a, b, **options):
    a64, b64 = a.dequantize().double(), b.dequantize().double()
    return calc_diff(emulated_gemm(a, b, **options), a64 @ b64.T, a64, b64)


def test_sums_of_few_bits_are_exact():
    a, b = (torch.randint(-3, 4, (8, 32)).float() for _ in range(2))
    start = torch.randint(-100, 100, (8, 8)).float()
    assert torch.equal(tensor_core_dot(a, b, start), start.double() + a.double() @ b.double().T)


def test_a_term_is_cut_off_13_bits_below_the_largest_not_rounded():
    a, b = torch.zeros(1, 32), torch.ones(1, 32)
    a[0, 0], a[0, 1] = 256.0, 2.0**-5 * 1.75
    total = tensor_core_dot(a, b, torch.zeros(1, 1))
    assert float(total) == 256 + 2.0**-5
    assert float(tensor_core_dot(-a, b, torch.zeros(1, 1))) == -256 - 2.0**-5  # toward zero on either side
    assert float(tensor_core_dot(a[:, 1:], b[:, 1:], torch.full((1, 1), 1024.0))) == 1024  # aligned to the accumulator
    assert float(tensor_core_dot(a, b, torch.zeros(1, 1), fraction_bits=20)) == 256 + 2.0**-5 * 1.75


def test_a_product_has_the_exponent_of_its_factors_and_the_sum_is_cut_off_too():
    """What was found of an H100 (MMA-Sim, arXiv 2511.10909): 1.75 x 1.75, though above 2, counts with exponent 0."""
    a, b = torch.zeros(1, 32), torch.zeros(1, 32)
    a[0, :3], b[0, :3] = torch.tensor([1.75, 2.0**-7, 2.0**-7]), torch.tensor([1.75, 2.0**-6, 2.0**-6])
    nothing = torch.zeros(1, 1)
    assert float(tensor_core_dot(a, b, nothing)) == 1.75**2 + 2 * 2.0**-13
    a[0, 2] = 0
    assert float(tensor_core_dot(a, b, nothing)) == 1.75**2  # its 13 fraction bits end at 2^-12
    a[0, 0] = 0
    for start, total in ((0, 2.0**-13), (1, 1 + 2.0**-13), (2 - 2.0**-13, 2), (2, 2), (-2, -2)):
        assert float(tensor_core_dot(a, b, nothing + start)) == total


def test_promotion_is_what_keeps_a_long_positive_sum():
    """The bounds that every back end is held to, and that no back end meets without promotion."""
    a, b = (constant_scales(torch.randn(48, 4096).abs() * 100) for _ in range(2))
    errors = [distance(a, b, promote_every=interval) for interval in (32, 128, 512, None)]
    assert errors[1] <= 5e-6 and errors[3] >= 1e-4
    assert errors == sorted(errors)


def test_zero_mean_data_is_blind_to_it():
    a, b = (constant_scales(torch.randn(48, 4096) * 100) for _ in range(2))
    assert distance(a, b, promote_every=None) <= 5e-6


@pytest.mark.parametrize("kind", KINDS)
def test_promoted_products_meet_the_bounds_of_a_gpu(kind):
    a, (b, _) = (
        quantize_rows(data(kind, 32, 576, device="cpu")),
        quantize_blocks(data("normal", 144, 576, device="cpu")),
    )
    assert distance(a, b) <= (2e-6 if kind == "positive" else 3e-7)
    columns = [quantize_columns(data(kind, 400, size, device="cpu")) for size in (32, 48)]
    assert distance(*columns) <= (2e-6 if kind == "positive" else 3e-7)


def test_scales_that_vary_cannot_be_left_to_the_end():
    a, b = quantize_rows(torch.randn(4, 256)), quantize_rows(torch.randn(4, 256))
    with pytest.raises(AssertionError, match="vary"):
        emulated_gemm(a, b, promote_every=None)
