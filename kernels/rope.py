"""RoPE with the concatenation around it: queries and keys as attention reads them, in one launch each, and back.

A head has `nope` features without position, then `rope` features that are rotated: pair (2i, 2i+1) is turned by the
angle of pair i, and the turned pairs are stored apart, all first members before all second ones, as the released
checkpoints' reference has them. Keys share one rotary part: it is turned once a token and written to every head.
Numerics: FP32 inside, one rounding; what is not rotated is copied. Backward is the transpose: turned back, the shared
part's gradient summed over heads in FP32.

Queries and keys are written beside their source and not in place: under recomputation the source may be kept.
Legend: T tokens, H heads.
"""

import torch
from torch import Tensor

from fp8moe.kernels import backend


def rope_queries(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """q [T, H, nope + rope] BF16 or FP32, cos, sin FP32 [T, rope/2] -> the same with the last `rope` features rotated.

    Raises ValueError for other shapes or dtypes.
    """
    _check("rope_queries", "q", q, cos, sin)
    rotated: Tensor = backend.op("rope_queries")(q, cos, sin)
    return rotated


def rope_queries_backward(dq: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """dq [T, H, nope + rope] of `rope_queries`' result -> the gradient of its q.

    Raises ValueError for other shapes or dtypes.
    """
    _check("rope_queries_backward", "dq", dq, cos, sin)
    turned: Tensor = backend.op("rope_queries_backward")(dq, cos, sin)
    return turned


def rope_keys(kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, *, nope_dim: int) -> Tensor:
    """kv [T, H, nope + v], k_rope [T, rope] -> keys [T, H, nope + rope]: the `nope_dim` first of kv, k_rope rotated.

    The values, kv's other features, stay where they are. Raises ValueError for other shapes or dtypes.
    """
    _check("rope_keys", "kv", kv, cos, sin, width=nope_dim)
    if k_rope.shape != (kv.shape[0], 2 * cos.shape[1]) or k_rope.dtype is not kv.dtype:
        raise ValueError(
            f"rope_keys takes k_rope [{kv.shape[0]}, {2 * cos.shape[1]}] of kv's {kv.dtype}, got {list(k_rope.shape)} "
            f"{k_rope.dtype}: pass the shared rotary part of the same tokens"
        )
    keys: Tensor = backend.op("rope_keys")(kv, k_rope, cos, sin, nope_dim=nope_dim)
    return keys


def rope_keys_backward(dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """dk [T, H, nope + rope], dv [T, H, v] -> (d kv [T, H, nope + v], d k_rope [T, rope]).

    Raises ValueError for other shapes or dtypes.
    """
    _check("rope_keys_backward", "dk", dk, cos, sin)
    if dv.dim() != 3 or dv.shape[:2] != dk.shape[:2] or dv.dtype is not dk.dtype:
        raise ValueError(
            f"rope_keys_backward takes dv [{dk.shape[0]}, {dk.shape[1]}, v] of dk's {dk.dtype}, got {list(dv.shape)} "
            f"{dv.dtype}: pass the gradient of the same heads' values"
        )
    d_kv, d_rope = backend.op("rope_keys_backward")(dk, dv, cos, sin)
    return d_kv, d_rope


def _check(op: str, name: str, x: Tensor, cos: Tensor, sin: Tensor, *, width: int | None = None) -> None:
    if x.dim() != 3 or x.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(
            f"{op} takes {name} [T, H, d] in BF16 or FP32, got {list(x.shape)} {x.dtype}: view it by heads"
        )
    if cos.shape != sin.shape or cos.dim() != 2 or cos.shape[0] != x.shape[0] or cos.shape[1] < 1:
        raise ValueError(
            f"{op} takes cos and sin [{x.shape[0]}, rope/2], got {list(cos.shape)} and {list(sin.shape)}: "
            "pass the rotation of these tokens"
        )
    if cos.dtype is not torch.float32 or sin.dtype is not torch.float32:
        raise ValueError(f"{op} takes cos and sin in FP32, got {cos.dtype} and {sin.dtype}: leave them uncast")
    least = 2 * cos.shape[1] if width is None else width
    if x.shape[2] < least:
        raise ValueError(f"{op} needs at least {least} features a head for {name}, got {x.shape[2]}: pass whole heads")
