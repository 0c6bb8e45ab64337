"""The FP8 tensor: decoding against the format's definition, tiles with short ends, layouts of scales."""

import numpy as np
import pytest
import torch

from fp8moe.kernels.fp8 import BLOCK_TILE, E4M3, ROW_TILE, Fp8Tensor, check_groups, check_sizes, scale_shape
from tests.kernels.operands import e4m3_values


def test_every_code_decodes_to_its_value() -> None:
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8)
    positive = e4m3_values()
    q = Fp8Tensor(codes.view(E4M3)[None].clone(), torch.full((1, 2), 0.75))
    expected = np.concatenate([positive, -positive]) * 0.75
    assert torch.equal(q.dequantize()[0].double(), torch.from_numpy(expected))
    assert bool(torch.signbit(q.dequantize()[0, 127]))  # minus zero


def test_scales_at_the_ends_of_fp32_decode_exactly() -> None:
    data = torch.tensor([[448.0, 2.0**-9, -240.0]]).to(E4M3)
    for scale in (2.0**127 / 448, 1e-30 / 448):
        q = Fp8Tensor(data, torch.tensor([[scale]]))
        assert torch.equal(q.dequantize(), data.float() * torch.tensor(scale))


def test_nan_scale_reaches_every_value() -> None:
    q = Fp8Tensor(torch.ones(2, 256).to(E4M3), torch.tensor([[1.0, float("nan")], [1.0, 1.0]]))
    nan = q.dequantize().isnan()
    assert bool(nan[0, 128:].all()) and not bool(nan[0, :128].any()) and not bool(nan[1].any())


@pytest.mark.parametrize("tile", [ROW_TILE, BLOCK_TILE])
@pytest.mark.parametrize("shape", [(130, 576), (2, 144, 48), (128, 256), (0, 128)])
def test_dequantize_multiplies_each_tile_by_its_scale(tile: tuple[int, int], shape: tuple[int, ...]) -> None:
    codes = torch.randn(shape).to(E4M3)
    scale = torch.rand(scale_shape(shape, tile)) + 0.5
    values = Fp8Tensor(codes, scale, tile).dequantize()
    row, column = torch.meshgrid(torch.arange(shape[-2]), torch.arange(shape[-1]), indexing="ij")
    expected = codes.to(torch.float32) * scale[..., row // tile[0], column // tile[1]]
    assert torch.equal(values, expected)
    assert Fp8Tensor(codes, scale, tile).dequantize(torch.bfloat16).dtype is torch.bfloat16


def test_dequantize_follows_transposed_codes() -> None:
    codes, scale = torch.randn(256, 48).to(E4M3).t(), torch.rand(2, 48).t()
    expected = Fp8Tensor(codes.contiguous(), scale.contiguous()).dequantize()
    assert torch.equal(Fp8Tensor(codes, scale).dequantize(), expected)


def test_scale_layouts() -> None:
    q = Fp8Tensor(torch.randn(48, 384).to(E4M3), torch.rand(48, 3))
    moved = q.to_m_major()
    assert q.scale_layout == "token_major" and moved.scale_layout == "m_major"
    assert moved.scale.stride() == (1, 48) and torch.equal(moved.scale, q.scale)
    assert moved.shape == (48, 384) and moved.device == torch.device("cpu")


def test_index_rows() -> None:
    q = Fp8Tensor(torch.randn(5, 144).to(E4M3), torch.rand(5, 2))
    index = torch.tensor([4, 0, 4])
    assert torch.equal(q.index_rows(index).dequantize(), q.dequantize()[index])
    blocks = Fp8Tensor(torch.randn(5, 144).to(E4M3), torch.rand(1, 2), BLOCK_TILE)
    with pytest.raises(ValueError, match=r"\(1, 128\) only, this tensor has \(128, 128\)"):
        blocks.index_rows(index)


def test_a_scale_of_another_shape_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"scale is \(4, 1\), tile \(1, 128\) asks for \(4, 2\)"):
        Fp8Tensor(torch.randn(4, 144).to(E4M3), torch.rand(4, 1))
    with pytest.raises(AssertionError):
        Fp8Tensor(torch.randn(4, 144), torch.rand(4, 2))


def test_sizes_and_groups_are_checked() -> None:
    check_sizes(K=576, N=0)
    with pytest.raises(ValueError, match="K=100 must be a multiple of 16, which FP8 needs: use 96"):
        check_sizes(K=100)
    check_groups(torch.tensor([0, 128, 128, 256], dtype=torch.int32), 3, 256, 128)
    for offsets, message in (
        ([0, 128], "group_offsets of 2 groups must be int32"),
        ([0, 256, 128], "ascend from 0"),
        ([128, 128, 256], "ascend from 0"),
        ([0, 128, 512], "at most 256 rows"),
        ([0, 64, 256], "multiples of 128 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            check_groups(torch.tensor(offsets, dtype=torch.int32), 2, 256, 128)
    with pytest.raises(ValueError, match="int64"):
        check_groups(torch.tensor([0, 128, 256]), 2, 256, 128)
