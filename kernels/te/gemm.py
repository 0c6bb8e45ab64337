"""FP8 GEMM by TransformerEngine's `general_gemm`, the function under all of its modules, on its block-scaled tensors.

`Float8BlockwiseQTensor` is documented to be made of codes (as bytes) and scales, so what this project has cast goes in
as it is. Scales as its GEMM wants them: of 1x128 tiles [K/128, M], of 128x128 blocks [N/128, K/128 rounded up to 4]; M
a multiple of 4, N of 8, K of 16. Layout "TN" is left [N, K], right [M, K] -> right @ left^T. Before 2.11 the caller had
to bring a workspace; that form is not served. Nothing is grouped here: `general_grouped_gemm` takes the group sizes
from the host, which a step without synchronisation does not have.
"""

import torch
from torch import Tensor
from transformer_engine.pytorch import Float8BlockQuantizer, Float8BlockwiseQTensor
from transformer_engine.pytorch.constants import TE_DType
from transformer_engine.pytorch.cpp_extensions import general_gemm

from fp8moe.kernels.cublas.gemm import ROWS_MULTIPLE, block_scales, m_major, padded_rows
from fp8moe.kernels.fp8 import BLOCK_TILE, E4M3, Fp8Tensor


def gemm(
    a: Fp8Tensor, b: Fp8Tensor, *, out_dtype: torch.dtype = torch.bfloat16, accumulate: Tensor | None = None
) -> Tensor:
    (m, k), n = a.shape, b.shape[0]
    if min(m, n, k) == 0:
        return torch.zeros(m, n, dtype=out_dtype, device=a.device) if accumulate is None else accumulate
    in_place = accumulate is not None and m % ROWS_MULTIPLE == 0 and accumulate.is_contiguous()
    rows = _tensor(*padded_rows(a), blocks=False)
    blocks = b.tile == BLOCK_TILE
    columns = _tensor(b.data.contiguous(), block_scales(b.scale) if blocks else m_major(b.scale), blocks=blocks)
    product: Tensor = general_gemm(
        columns,
        rows,
        out_dtype=out_dtype if accumulate is None else torch.float32,
        layout="TN",
        out=accumulate if in_place else None,
        accumulate=in_place,
    )[0]
    if accumulate is None:
        return product[:m]
    return accumulate if in_place else accumulate.add_(product[:m])


def _tensor(codes: Tensor, scale: Tensor, *, blocks: bool) -> Tensor:
    """TransformerEngine's tensor of codes [M, K] and of scales as cuBLASLt takes them: stride 1 along the first dim."""
    fp8 = TE_DType[E4M3]
    quantizer = Float8BlockQuantizer(
        fp8, rowwise=True, columnwise=False, force_pow_2_scales=False, block_scaling_dim=2 if blocks else 1
    )
    return Float8BlockwiseQTensor(
        shape=codes.shape,
        dtype=torch.bfloat16,
        rowwise_data=codes.view(torch.uint8),
        rowwise_scale_inv=scale.t(),
        columnwise_data=None,
        columnwise_scale_inv=None,
        fp8_dtype=fp8,
        quantizer=quantizer,
        is_2D_scaled=blocks,
    )
