"""FP8 GEMM by `torch.nn.functional.scaled_mm` with block-wise scales.

Layouts it demands (older versions answered wrongly where one was off): A row-major, M a multiple of 4, with scales
[M, K/128] at strides (1, M); B column-major, with 1x128 scales [N, K/128] at strides (1, N), or with 128x128 scales
[K/128 rounded up to 4, N/128] at stride 1 along the first. Fast accumulation stays off: promotion exists against it.
There is no accumulating output and nothing grouped: a sum costs a pass of its own, and grouped ops go to another back
end.
"""

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, pad, scaled_mm

from fp8moe.kernels.fp8 import BLOCK_TILE, E4M3, ROW_TILE, Fp8Tensor

ROWS_MULTIPLE = 4
RECIPE = {ROW_TILE: ScalingType.BlockWise1x128, BLOCK_TILE: ScalingType.BlockWise128x128}


def gemm(
    a: Fp8Tensor, b: Fp8Tensor, *, out_dtype: torch.dtype = torch.bfloat16, accumulate: Tensor | None = None
) -> Tensor:
    (m, k), n = a.shape, b.shape[0]
    if min(m, n, k) == 0:
        return torch.zeros(m, n, dtype=out_dtype, device=a.device) if accumulate is None else accumulate
    codes, scale_a = padded_rows(a)
    scale_b = block_scales(b.scale) if b.tile == BLOCK_TILE else m_major(b.scale)
    product = scaled_mm(
        codes,
        b.data.contiguous().t(),
        scale_a,
        RECIPE[a.tile],
        scale_b,
        RECIPE[b.tile],
        output_dtype=out_dtype if accumulate is None else torch.float32,
        use_fast_accum=False,
    )[:m]
    return product if accumulate is None else accumulate.add_(product)


def padded_rows(a: Fp8Tensor) -> tuple[Tensor, Tensor]:
    """Codes [M', K], contiguous, and scales [M', K/128] at strides (1, M'), M' being M rounded up to 4."""
    missing = -a.shape[0] % ROWS_MULTIPLE
    codes, scale = a.data.contiguous(), a.scale
    if missing:
        codes = pad(codes.view(torch.uint8), (0, 0, 0, missing)).view(E4M3)
        scale = pad(scale, (0, 0, 0, missing))
    return codes, m_major(scale)


def m_major(scale: Tensor) -> Tensor:
    """Scales [M, K/128] at strides (1, M)."""
    return scale.mT.contiguous().mT


def block_scales(scale: Tensor) -> Tensor:
    """Scales [N/128, K/128] of a weight -> [K/128 rounded up to 4, N/128], stride 1 along the first."""
    return pad(scale, (0, -scale.shape[1] % 4)).contiguous().t()
