"""The adapter to TransformerEngine, with a stand-in of what it calls: the signatures are those of 2.11 to 2.20.

The stand-in checks shapes and layouts as that package documents them and computes by definition. Whether the real one
agrees is for a machine that has it: there the last test runs.
"""

import importlib
import importlib.metadata
import importlib.util
import sys
import types

import pytest
import torch

from fp8moe.kernels import backend
from fp8moe.kernels.fp8 import BLOCK_TILE, E4M3, ROW_TILE, Fp8Tensor, ceil_div
from fp8moe.kernels.quantize import quantize_blocks, quantize_columns, quantize_rows
from tests.distance import calc_diff

MODULE = "fp8moe.kernels.te.gemm"
absent = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is not None, reason="the real package is here"
)


class Quantizer:
    def __init__(
        self, fp8_dtype, *, rowwise, columnwise, amax_epsilon=0.0, force_pow_2_scales=True, block_scaling_dim=2
    ):
        assert fp8_dtype == "kFloat8E4M3" and rowwise and not columnwise
        self.block_scaling_dim = block_scaling_dim


class QTensor:
    def __init__(
        self, shape, dtype, *, rowwise_data, rowwise_scale_inv, columnwise_data, columnwise_scale_inv, fp8_dtype,
        quantizer, is_2D_scaled, requires_grad=False,
    ):  # fmt: skip
        m, tiles = shape[0], ceil_div(shape[1], 128)
        assert rowwise_data.dtype is torch.uint8 and rowwise_data.is_contiguous() and rowwise_data.shape == shape
        assert columnwise_data is None and columnwise_scale_inv is None and dtype is torch.bfloat16
        assert quantizer.block_scaling_dim == (2 if is_2D_scaled else 1)
        wanted = (ceil_div(m, 128), ceil_div(tiles, 4) * 4) if is_2D_scaled else (tiles, m)
        assert rowwise_scale_inv.shape == wanted and rowwise_scale_inv.is_contiguous()
        assert is_2D_scaled or m % 4 == 0
        scale = rowwise_scale_inv[:, :tiles] if is_2D_scaled else rowwise_scale_inv.t()
        tile = BLOCK_TILE if is_2D_scaled else ROW_TILE
        self.value = Fp8Tensor(rowwise_data.view(E4M3), scale, tile).dequantize().double()


@pytest.fixture
def calls(monkeypatch):
    seen = []

    def general_gemm(
        A, B, out_dtype=None, quantization_params=None, gelu=False, gelu_in=None, alpha=1.0, beta=None,
        accumulate=False, layout="TN", out=None, bias=None, use_split_accumulator=False, grad=False, ub=None,
        ub_type=None, extra_output=None, bulk_overlap=False,
    ):  # fmt: skip
        assert layout == "TN" and (out is not None or not accumulate)
        assert out is None or (out.is_contiguous() and out.dtype is out_dtype)
        seen.append("accumulated" if accumulate else "plain")
        product = B.value @ A.value.t()
        out = product.to(out_dtype) if out is None else out.copy_(product + out if accumulate else product)
        return out, None, None, None

    parts = ("", ".pytorch", ".pytorch.constants", ".pytorch.cpp_extensions")
    fakes = {name: types.ModuleType(f"transformer_engine{name}") for name in parts}
    fakes[".pytorch"].Float8BlockQuantizer, fakes[".pytorch"].Float8BlockwiseQTensor = Quantizer, QTensor
    fakes[".pytorch.constants"].TE_DType = {E4M3: "kFloat8E4M3"}
    fakes[".pytorch.cpp_extensions"].general_gemm = general_gemm
    for name, module in fakes.items():
        monkeypatch.setitem(sys.modules, f"transformer_engine{name}", module)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    yield seen
    sys.modules.pop(MODULE, None)


@absent
@pytest.mark.parametrize(("m", "n", "k"), [(64, 144, 272), (130, 576, 640), (7, 16, 16)])
def test_rows_by_blocks_and_by_rows(m, n, k, calls):
    gemm = importlib.import_module(MODULE).gemm
    a, w = quantize_rows(torch.randn(m, k)), torch.randn(n, k)
    for b in (quantize_blocks(w)[0], quantize_rows(w)):
        left, right = a.dequantize().double(), b.dequantize().double()
        exact = left @ right.t()
        out = gemm(a, b)
        assert out.shape == (m, n) and out.dtype is torch.bfloat16 and calc_diff(out, exact, left, right) <= 5e-6
        assert calc_diff(gemm(a, b, out_dtype=torch.float32), exact, left, right) <= 1e-12
        total = torch.randn(m, n)
        before = total.clone()
        assert gemm(a, b, accumulate=total) is total
        assert calc_diff(total - before, exact, left, right) <= 1e-10
    assert ("accumulated" in calls) is (m % 4 == 0)


@absent
def test_columns_are_added_where_the_sum_lies(calls):
    gemm = importlib.import_module(MODULE).gemm
    dy, x = quantize_columns(torch.randn(272, 64)), quantize_columns(torch.randn(272, 48))
    exact = dy.dequantize().double() @ x.dequantize().double().t()
    total, strided = torch.ones(64, 48), torch.ones(64, 96)[:, ::2]
    gemm(dy, x, accumulate=total)
    gemm(dy, x, accumulate=strided)
    assert calls == ["accumulated", "plain"] and calc_diff(total, exact + 1) <= 1e-12
    assert torch.allclose(strided, total, atol=1e-4)


@absent
def test_nothing_to_multiply(calls):
    gemm = importlib.import_module(MODULE).gemm
    b = quantize_blocks(torch.randn(32, 16))[0]
    assert gemm(quantize_rows(torch.zeros(0, 16)), b).shape == (0, 32) and not calls


def test_an_old_release_is_named(monkeypatch):
    found = importlib.util.find_spec("torch")
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: found)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "2.8.0+abc")
    assert backend.why_not("te") == "it needs transformer_engine 2.11 or newer, this is 2.8.0+abc"


@pytest.mark.gpu
def test_the_real_package_agrees():
    if reason := backend.why_not("te"):
        pytest.skip(reason)
    gemm = importlib.import_module(MODULE).gemm
    x, w = torch.randn(130, 2112, device="cuda"), torch.randn(576, 2112, device="cuda")
    a, b = quantize_rows(x), quantize_blocks(w)[0]
    left, right = a.dequantize().double(), b.dequantize().double()
    assert calc_diff(gemm(a, b), left @ right.t(), left, right) <= 5e-6
    dy, columns = (quantize_columns(torch.randn(512, size, device="cuda")) for size in (256, 384))
    total = torch.zeros(256, 384, device="cuda")
    gemm(dy, columns, accumulate=total)
    left, right = dy.dequantize().double(), columns.dequantize().double()
    assert calc_diff(total, left @ right.t(), left, right) <= 3e-7
