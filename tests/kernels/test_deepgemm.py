"""The DeepGEMM adapter, with a stand-in of that package that checks what it is given and computes by definition.

Whether the real package agrees with its stand-in is for a machine that has it: there the last test runs.
"""

import importlib
import importlib.util
import sys
import types

import pytest
import torch

from fp8moe.kernels.fp8 import BLOCK_TILE, Fp8Tensor
from fp8moe.kernels.quantize import quantize_blocks, quantize_rows
from tests.distance import calc_diff
from tests.kernels.device_cases import data, offsets_of

MODULES = ("fp8moe.kernels.deepgemm.gemm", "fp8moe.kernels.deepgemm.grouped_gemm")


@pytest.fixture
def calls(monkeypatch):
    """What the stand-in was called with; the adapter is imported against it."""
    seen = []

    def check(codes, scale):
        assert codes.is_contiguous() and codes.dtype is torch.float8_e4m3fn and scale.dtype is torch.float32

    def dense(a, b, out):
        seen.append("dense")
        check(*a)
        check(*b)
        product = Fp8Tensor(*a).dequantize() @ Fp8Tensor(*b, BLOCK_TILE).dequantize().T
        out.copy_(product)

    def grouped(a, b, out, group):
        seen.append("grouped")
        check(*a)
        check(*b)
        assert group.dtype is torch.int32 and group.shape == a[0].shape[:1]
        rows, weights = Fp8Tensor(*a).dequantize(), Fp8Tensor(*b, BLOCK_TILE).dequantize()
        for r, e in enumerate(group.tolist()):
            if e >= 0:
                out[r] = rows[r] @ weights[e].T

    package = types.ModuleType("deep_gemm")
    package.fp8_gemm_nt, package.m_grouped_fp8_gemm_nt_contiguous = dense, grouped
    monkeypatch.setitem(sys.modules, "deep_gemm", package)
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield seen
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.mark.skipif(importlib.util.find_spec("deep_gemm") is not None, reason="the real package is here")
def test_dense(triton_device, calls):
    gemm = importlib.import_module(MODULES[0]).gemm
    x, w = data("normal", 40, 272, device=triton_device), data("normal", 144, 272, device=triton_device)
    a, (b, _) = quantize_rows(x), quantize_blocks(w)
    a64, b64 = a.dequantize().double(), b.dequantize().double()
    assert calc_diff(gemm(a, b), a64 @ b64.T, a64, b64) <= 5e-6 and calls == ["dense"]
    total = torch.zeros(40, 144, device=triton_device)
    gemm(a, b, accumulate=total)
    for out in (total, gemm(a, b, out_dtype=torch.float32), gemm(a, quantize_rows(w), out_dtype=torch.float32)):
        assert out.dtype is torch.float32 and calc_diff(out, x.double() @ w.double().T, x.double(), w.double()) <= 1e-3
    assert calls == ["dense"]
    assert gemm(quantize_rows(x[:0]), b).shape == (0, 144)


@pytest.mark.skipif(importlib.util.find_spec("deep_gemm") is not None, reason="the real package is here")
def test_grouped(triton_device, calls):
    grouped_gemm = importlib.import_module(MODULES[1]).grouped_gemm
    offsets = offsets_of([128, 0, 256], triton_device)
    x, w = data("normal", 416, 128, device=triton_device), data("normal", 3, 48, 128, device=triton_device)
    a, (b, _) = quantize_rows(x), quantize_blocks(w)
    out = grouped_gemm(a, b, offsets)
    exact = grouped_gemm(a, b, offsets, out_dtype=torch.float32)
    assert calls == ["grouped"] and calc_diff(out, exact) <= 5e-6
    assert not bool(out[384:].any()) and bool(out[:384].any(dim=1).all())


@pytest.mark.gpu
def test_the_real_package_agrees(triton_device):
    pytest.importorskip("deep_gemm")
    a, b = (data("normal", size, 7168, device=triton_device) for size in (512, 2048))
    rows, (blocks, _) = quantize_rows(a), quantize_blocks(b)
    ours = importlib.import_module(MODULES[0]).gemm(rows, blocks)
    a64, b64 = rows.dequantize().double(), blocks.dequantize().double()
    assert calc_diff(ours, a64 @ b64.T, a64, b64) <= 5e-6
    stacked = quantize_blocks(b.view(2, 1024, 7168))[0]
    grouped = importlib.import_module(MODULES[1]).grouped_gemm(rows, stacked, offsets_of([256, 256], triton_device))
    for e in range(2):
        left, right = a64[e * 256 : e * 256 + 256], b64[e * 1024 : e * 1024 + 1024]
        assert calc_diff(grouped[e * 256 : e * 256 + 256], left @ right.T, left, right) <= 5e-6
