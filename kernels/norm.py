"""RMSNorm fused with what stands around it: the residual add before it, the FP8 cast behind it.

y = x / sqrt(mean(x^2) + eps) * weight. Numerics: sum and products in FP32; y is rounded once, to the dtype of x, and
what is cast to FP8 is that rounded y: rows and columns are those of `quantize_rows(y)` and `quantize_columns(y)` bit
for bit. With a residual, h = x + delta is rounded to the dtype first, and normed as rounded.

Memory: backward keeps x, which the residual stream or a latent keeps anyway, and 1/rms, 4 bytes a row. Columns for the
weight gradient are made of both in one pass; keeping y was refused, reading it costs what reading x does. The gain's
gradient is added in FP32 into `main_grad`, unrounded: in BF16 it would lose 1.7e-3.

x may be a column slice of a wider matrix (a latent): rows may lie any distance apart.
Legend: T rows (tokens), D features.
"""

import torch
from torch import Tensor

from fp8moe.kernels import backend
from fp8moe.kernels.fp8 import Fp8Tensor, check_sizes, check_total
from fp8moe.kernels.quantize import ACTIVATIONS, observers


def rms_norm(
    x: Tensor,
    weight: Tensor,
    delta: Tensor | None = None,
    *,
    eps: float,
    tensor: bool = True,
    rows: bool = False,
    power_of_two: bool = False,
) -> tuple[Tensor, Tensor, Fp8Tensor, Tensor]:
    """x [T, D] BF16 or FP32, weight [D], delta [T, D] or None -> (h, y, rows, 1/rms [T] FP32).

    h = x + delta (no rows of it without delta), y the norm of h or x (no rows unless `tensor`), rows the FP8 rows of y
    (none unless `rows`; D is then a multiple of 16). What is not asked for is neither computed nor written.
    Raises ValueError for other shapes or dtypes, and where neither `tensor` nor `rows` is asked for.
    """
    _check("rms_norm", x, weight)
    if delta is not None:
        _check_like("rms_norm's delta", delta, x)
    if not (tensor or rows):
        raise ValueError("rms_norm was asked for neither tensor nor rows: ask for one of them, or both")
    if rows:
        check_sizes(D=x.shape[1])
    watched = rows and bool(observers)
    asked = {"tensor": tensor or watched, "rows": rows, "power_of_two": power_of_two}
    h, y, q, inverse_rms = backend.op("rms_norm")(x, weight, delta, eps=eps, **asked)
    if watched:
        observers[-1](y, q, ACTIVATIONS)
    return h, y if tensor else y[:0], q, inverse_rms


def rms_norm_columns(x: Tensor, weight: Tensor, inverse_rms: Tensor, *, power_of_two: bool = False) -> Fp8Tensor:
    """x [T, D], weight [D], 1/rms [T] from `rms_norm` -> the FP8 columns [D, T] of y, for Wgrad.

    T and D are multiples of 16. Raises ValueError for other shapes or dtypes.
    """
    _check("rms_norm_columns", x, weight)
    _check_inverse(inverse_rms, x.shape[0])
    check_sizes(T=x.shape[0], D=x.shape[1])
    q: Fp8Tensor = backend.op("rms_norm_columns")(x, weight, inverse_rms, power_of_two=power_of_two)
    if observers:
        y = (x.float() * inverse_rms[:, None] * weight.float()).to(x.dtype)
        observers[-1](y.t(), q, ACTIVATIONS)
    return q


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, inverse_rms: Tensor, main_grad: Tensor, residual: Tensor | None = None
) -> Tensor:
    """dy [T, D], x [T, D] (h where there was a delta), 1/rms [T] -> dx [T, D]; adds the gain's gradient to main_grad.

    main_grad: FP32 [D]. residual: another gradient [T, D] of x, added in FP32 before dx is rounded.
    The order of every sum depends on the sizes alone. Raises ValueError for other shapes or dtypes.
    """
    _check("rms_norm_backward", x, weight)
    _check_like("rms_norm_backward's dy", dy, x)
    if residual is not None:
        _check_like("rms_norm_backward's residual", residual, x)
    _check_inverse(inverse_rms, x.shape[0])
    check_total(main_grad, (x.shape[1],))
    dx: Tensor = backend.op("rms_norm_backward")(dy, x, weight, inverse_rms, main_grad, residual)
    return dx


def _check(name: str, x: Tensor, weight: Tensor) -> None:
    if x.dim() != 2 or x.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"{name} takes x [T, D] in BF16 or FP32, got {list(x.shape)} {x.dtype}: flatten and cast it")
    if weight.shape != x.shape[1:] or weight.dtype is not x.dtype:
        raise ValueError(
            f"{name} takes a weight {list(x.shape[1:])} of x's {x.dtype}, got {list(weight.shape)} {weight.dtype}: "
            "pass the gain of these features"
        )


def _check_like(name: str, other: Tensor, x: Tensor) -> None:
    if other.shape != x.shape or other.dtype is not x.dtype:
        raise ValueError(
            f"{name} must be {list(x.shape)} {x.dtype} as x is, got {list(other.shape)} {other.dtype}: cast or view it"
        )


def _check_inverse(inverse_rms: Tensor, t: int) -> None:
    if inverse_rms.shape != (t,) or inverse_rms.dtype is not torch.float32:
        raise ValueError(
            f"1/rms must be FP32 [{t}], one a row, got {list(inverse_rms.shape)} {inverse_rms.dtype}: "
            "pass what rms_norm returned"
        )
