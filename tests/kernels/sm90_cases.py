"""What is launched for the compile gate: each op of each device back end, with every production tile.

Tensors are never read, so they are unfilled. A tile is handed to the launcher in place of the table's choice, so that
the tiles of every device in the table are compiled, not only those of this one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor

from fp8moe.kernels import tiles
from fp8moe.kernels.backend import release_of
from fp8moe.kernels.fp8 import E4M3, Fp8Tensor, scale_shape
from fp8moe.kernels.row_map import RowMap
from fp8moe.kernels.segments import Segments
from fp8moe.kernels.tiles import Tile

Case = tuple[str, Callable[[], Any]]
M, N, K = 4096, 4096, 7168
GROUPS = 4
SHORT = 1024
# SwiGLU: label, dtype, F, weighted, power of two. 320 is no multiple of 128: one tile holds both gate and up.
ACTIVATIONS = (
    ("bf16 fp32scale", torch.bfloat16, 256, True, False),
    ("bf16 pow2", torch.bfloat16, 256, True, True),
    ("fp32 fp32scale", torch.float32, 256, True, False),
    ("bf16 plain", torch.bfloat16, 256, False, False),
    ("bf16 F320", torch.bfloat16, 320, True, False),
)
RECOMPUTED = ("bf16 fp32scale", "bf16 plain")  # what makes other columns of the cached copy
UNCAST = (*RECOMPUTED, "fp32 fp32scale")  # what differs without casts
PAIRS_SINCE = (3, 8)  # of Triton


def rows(m: int, k: int) -> Fp8Tensor:
    """Unfilled FP8 rows (or columns) with M-major scales."""
    scale = torch.empty(scale_shape((m, k), (1, 128))[::-1])
    return Fp8Tensor(torch.empty(m, k, dtype=E4M3), scale.t())


def blocks(*shape: int) -> Fp8Tensor:
    """Unfilled FP8 weight blocks."""
    return Fp8Tensor(torch.empty(shape, dtype=E4M3), torch.empty(scale_shape(shape, (128, 128))), (128, 128))


def offsets() -> Tensor:
    return torch.zeros(GROUPS + 1, dtype=torch.int32)


@contextmanager
def chosen(tile: Tile) -> Iterator[None]:
    """As if the table had chosen `tile`, whatever a launcher remembers of a size."""
    remembered = importlib.import_module("fp8moe.kernels.triton.gemm").choose_tile
    remembered.cache_clear()
    with patch.object(tiles, "choose", lambda *_, **__: tile):
        yield
    remembered.cache_clear()


def with_tile(tile: Tile, launch: Callable[[], Any]) -> None:
    """Launch as if the table had chosen `tile`."""
    with chosen(tile):
        launch()


def gemm_cases(backend: str) -> Iterator[Case]:
    """gemm, grouped_gemm and grouped_wgrad with every tile that this Triton can run, output dtype and epilogue."""
    gemm = importlib.import_module(f"fp8moe.kernels.{backend}.gemm").gemm
    grouped_gemm = importlib.import_module(f"fp8moe.kernels.{backend}.grouped_gemm").grouped_gemm
    grouped_wgrad = importlib.import_module(f"fp8moe.kernels.{backend}.grouped_gemm").grouped_wgrad
    total, grads = torch.empty(M, N), torch.empty(GROUPS, M, N)
    columns, experts = (rows(M, K), rows(N, K)), (rows(M, K), blocks(GROUPS, N, K), offsets())
    few, many = ((rows(M, tokens), rows(N, tokens)) for tokens in (SHORT, GROUPS * K))  # columns of few or many tokens
    launches = [
        ("gemm", "add", partial(gemm, rows(M, K), blocks(N, K), accumulate=total)),
        ("gemm_columns", "add", partial(gemm, *few, accumulate=total)),
        ("gemm_columns", "add_long", partial(gemm, *many, accumulate=total)),
        ("grouped_wgrad", "add", partial(grouped_wgrad, *few, offsets(), grads)),
        ("grouped_wgrad", "add_long", partial(grouped_wgrad, *many, offsets(), grads)),
    ]
    for dtype, kind in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        launches += [
            ("gemm", kind, partial(gemm, rows(M, K), blocks(N, K), out_dtype=dtype)),
            ("gemm_columns", kind, partial(gemm, *columns, out_dtype=dtype)),
            ("grouped_gemm", kind, partial(grouped_gemm, *experts, out_dtype=dtype)),
        ]
    for op, kind, launch in launches:
        for tile in legal_tiles(backend, op, kind):
            yield f"{backend} {op} {kind} {tile_name(tile)}", partial(with_tile, tile, launch)


def legal_tiles(backend: str, op: str, kind: str) -> tuple[Tile, ...]:
    """Production tiles of an op, with pairs where this Triton has them and TMA doesn't add."""
    pairs = release_of(triton.__version__) >= PAIRS_SINCE and kind != "add_long"
    return tiles.production_tiles(backend, op, pairs=pairs)


def tile_name(tile: Tile) -> str:
    """What of a tile changes its code; the swept rows are in it too, as a constant of the kernel."""
    return f"{tile.block_m}x{tile.block_n}x{tile.stages} group {tile.group}" + " multicast" * tile.multicast


def cast_cases() -> Iterator[Case]:
    """Every cast, from BF16 and from FP32, with both kinds of scales."""
    quantize = importlib.import_module("fp8moe.kernels.triton.quantize")
    e5m6 = importlib.import_module("fp8moe.kernels.triton.e5m6")
    m, k = 4096, 7168
    for dtype, kind in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for power_of_two in (False, True):
            label = f"{kind} {'pow2' if power_of_two else 'fp32scale'}"
            for name in ("quantize_rows", "quantize_columns", "quantize_rows_and_columns"):
                cast = partial(getattr(quantize, name), torch.empty(m, k, dtype=dtype), power_of_two=power_of_two)
                yield f"triton {name} {label}", cast
            weight = torch.empty(GROUPS, 256, k, dtype=dtype)
            yield (
                f"triton quantize_blocks {label}",
                partial(quantize.quantize_blocks, weight, power_of_two=power_of_two),
            )
    yield "triton requantize_columns", partial(quantize.requantize_columns, rows(m, k))
    values = torch.empty(m, k, dtype=torch.bfloat16)
    yield "triton pack_e5m6 bf16", partial(e5m6.pack_e5m6, values)
    yield "triton e5m6", partial(_unpack, e5m6, values)


def _unpack(e5m6: Any, values: Tensor) -> None:
    packed = e5m6.pack_e5m6(values)
    e5m6.unpack_e5m6(packed)
    e5m6.e5m6_to_columns(packed)


def unquantized_cases() -> Iterator[Case]:
    """Weight gradients of BF16 with every tile and of FP32, dense and grouped, and the grouped products."""
    wgrad = importlib.import_module("fp8moe.kernels.triton.gemm").wgrad
    grouped = importlib.import_module("fp8moe.kernels.triton.grouped_mm")
    m, n, k = 4096, 256, 7168
    for dtype, kind in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        dy, x, weights = (torch.empty(size, dtype=dtype) for size in ((m, n), (m, k), (GROUPS, n, k)))
        launches = {
            "wgrad": partial(wgrad, dy, x, torch.empty(n, k)),
            "grouped_mm_wgrad": partial(grouped.grouped_mm_wgrad, dy, x, offsets(), torch.empty(GROUPS, n, k)),
        }
        for op, launch in launches.items():
            for tile in tiles.production_tiles("triton", op):
                label = f" {tile_name(tile)}" if dtype is torch.bfloat16 else ""
                yield f"triton {op} {kind}{label}", partial(with_tile, tile, launch)
        yield f"triton grouped_mm {kind}", partial(grouped.grouped_mm, x, weights, offsets())


def permute_cases() -> Iterator[Case]:
    """The plan, rows of every kind to experts and back, and the cast on the way."""
    ops = importlib.import_module("fp8moe.kernels.triton.permute")
    n, k, topk, received = 4096, 7168, 8, 8192
    numbers = torch.empty(received, dtype=torch.int64)
    inverse = torch.empty(n * topk, dtype=torch.int32)
    row_map = RowMap(numbers, numbers, offsets(), numbers[:GROUPS], inverse, n, topk)
    ids = torch.empty(n, topk, dtype=torch.int64)
    yield "triton plan_rows", partial(ops.plan_rows, ids, 256, room=received)
    token_major = rows(n, k)
    token_major = Fp8Tensor(token_major.data, token_major.scale.contiguous())
    for kind, x in (("fp8", rows(n, k)), ("fp8 token-major", token_major), ("fp8 K576", rows(n, 576))):
        yield f"triton permute {kind}", partial(ops.permute, x, row_map)
    for dtype, kind in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        x = torch.empty(n, k, dtype=dtype)
        yield f"triton permute {kind}", partial(ops.permute, x, row_map)
        yield f"triton unpermute {kind}", partial(ops.unpermute, torch.empty(received, k, dtype=dtype), row_map)
        for power_of_two in (False, True):
            label = f"{kind} {'pow2' if power_of_two else 'fp32scale'}"
            cast = partial(ops.permute_quantize, x, row_map, power_of_two=power_of_two)
            yield f"triton permute_quantize {label}", cast


def update_cases() -> Iterator[Case]:
    """AdamW on flat buffers of both kinds of parameters, on weights with blocks, and the gradient's norm."""
    ops = importlib.import_module("fp8moe.kernels.triton.adamw")
    norm = importlib.import_module("fp8moe.kernels.triton.squared_norm").squared_norm
    constants = {"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.1, "step": 3, "beta1": 0.9, "beta2": 0.95}
    n, shape, scale = 1 << 22, (GROUPS, 256, 7168), torch.empty(())
    segments = Segments.of([(0, n, True)], "cpu")
    for moments, kind in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        settings = {**constants, "grad_scale": scale}
        flat, weight = _state(moments, n), torch.empty(n, dtype=torch.bfloat16)
        yield f"triton adamw_step {kind} moments", partial(ops.adamw_step, *flat, segments, weight, **settings)
        yield f"triton adamw_step {kind} moments no weight", partial(ops.adamw_step, *flat, segments, **settings)
        operands = (*_state(moments, *shape), torch.empty(shape, dtype=torch.bfloat16))
        both = (blocks(*shape), blocks(GROUPS, 7168, 256))
        yield (
            f"triton adamw_step_quantize {kind} moments",
            partial(ops.adamw_step_quantize, *operands, *both, **settings),
        )
    from_grad = partial(ops.adamw_step, *_state(torch.bfloat16, n), segments, **{**constants, "beta1": 0.3})
    yield "triton adamw_step from the gradient", from_grad
    yield "triton squared_norm", partial(norm, torch.empty(n))


def _state(moments: torch.dtype, *shape: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first, second = (torch.empty(shape, dtype=moments) for _ in range(2))
    return torch.empty(shape), torch.empty(shape), first, second


def loss_cases() -> Iterator[Case]:
    """The cross entropy of both dtypes, with a vocabulary of production, and the embedding's weight gradient."""
    loss = importlib.import_module("fp8moe.kernels.triton.cross_entropy")
    embedding = importlib.import_module("fp8moe.kernels.triton.embedding")
    labels, losses = torch.empty(2048, dtype=torch.int64), torch.empty(2048)
    ids = torch.zeros(4096, dtype=torch.int64)
    for dtype, kind in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        logits = torch.empty(2048, 129_280, dtype=dtype)
        yield f"triton cross_entropy {kind}", partial(loss.cross_entropy, logits, labels, losses)
        with_gradient = partial(loss.cross_entropy_with_gradient, logits, labels, losses[0].clone(), losses)
        yield f"triton cross_entropy_with_gradient {kind}", with_gradient
        dy, total = torch.empty(4096, 7168, dtype=dtype), torch.empty(512, 7168)
        yield f"triton embedding_wgrad {kind}", partial(embedding.embedding_wgrad, dy, ids, total)


def activation_cases() -> Iterator[Case]:
    """SwiGLU forward, its columns, backward, and without casts."""
    fused = importlib.import_module("fp8moe.kernels.triton.swiglu")
    plain = importlib.import_module("fp8moe.kernels.triton.silu_mul")
    r = 4096
    for label, dtype, f, weighted, power_of_two in ACTIVATIONS:
        gate_up, dy = torch.empty(r, 2 * f, dtype=dtype), torch.empty(r, f, dtype=dtype)
        weights, cached = torch.empty(r) if weighted else None, rows(r, 2 * f)
        yield f"triton swiglu {label}", partial(fused.swiglu, gate_up, weights, power_of_two=power_of_two)
        back = partial(fused.swiglu_backward, dy, cached, weights, power_of_two=power_of_two)
        yield f"triton swiglu_backward {label}", back
        if label in RECOMPUTED:
            yield f"triton swiglu_columns {label}", partial(fused.swiglu_columns, cached, weights)
        if label in UNCAST:
            yield f"triton silu_mul {label}", partial(_there_and_back, plain, dy, gate_up, weights)


def _there_and_back(ops: Any, dy: Tensor, gate_up: Tensor, weights: Tensor | None) -> None:
    ops.silu_mul(gate_up, weights)
    ops.silu_mul_backward(dy, gate_up, weights)


def route_cases() -> Iterator[Case]:
    """Routing by every score at the sizes of DeepSeek-V3 and V2 and of a model without groups, and its backward."""
    ops = importlib.import_module("fp8moe.kernels.triton.route")
    t, sequences = 4096, 2
    for score, num_experts, topk, num_groups, top_groups, group_score in (
        ("sigmoid", 256, 8, 8, 4, "top2_sum"),
        ("softmax", 160, 6, 8, 3, "max"),
        ("softmax_topk", 128, 4, 1, 1, "top2_sum"),
        ("sigmoid", 512, 16, 1, 1, "top2_sum"),
    ):
        logits, bias, counts = torch.empty(t, num_experts), torch.empty(num_experts), torch.empty(num_experts).long()
        scoring = {"score": score, "normalize": score != "softmax", "route_scale": 2.5}
        choosing = {"topk": topk, "num_groups": num_groups, "top_groups": top_groups, "group_score": group_score}
        label = f"{score} top-{topk} of {num_experts}"
        yield (
            f"triton route {label}",
            partial(
                ops.route, logits, bias, counts, num_sequences=sequences, force_balance=False, **choosing, **scoring
            ),
        )
        ids, d_weights = torch.empty(t, topk, dtype=torch.int64), torch.empty(t, topk)
        arguments = logits, ids, torch.empty(sequences, num_experts), d_weights, torch.empty(())
        yield f"triton route_backward {label}", partial(ops.route_backward, *arguments, **scoring)


def norm_cases() -> Iterator[Case]:
    """RMSNorm of DeepSeek-V3's widths and of the widest, each with what it writes there; columns; backward."""
    norm = importlib.import_module("fp8moe.kernels.triton.norm")
    m = 4096
    for dtype, kind in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        x, latents = torch.empty(m, 7168, dtype=dtype), torch.empty(m, 2112, dtype=dtype)
        inverse_rms = torch.empty(m)
        written = {
            "residual tensor and rows pow2": (x, x, {"rows": True, "power_of_two": True}),
            "tensor": (x, None, {}),
            "rows": (x, None, {"tensor": False, "rows": True}),
            "rows of a latent D1536": (latents[:, :1536], None, {"tensor": False, "rows": True}),
            "rows of a latent D512": (latents[:, 1536:2048], None, {"tensor": False, "rows": True}),
        }
        if dtype is torch.bfloat16:
            written["residual tensor and rows D16384"] = (*2 * (torch.empty(m, 16384, dtype=dtype),), {"rows": True})
        for label, (source, delta, asked) in written.items():
            weight = torch.empty(source.shape[1], dtype=dtype)
            yield (
                f"triton rms_norm {kind} {label}",
                partial(norm.rms_norm, source, weight, delta, **{"eps": 1e-6, **asked}),
            )
            backward = partial(
                norm.rms_norm_backward, torch.empty(source.shape, dtype=dtype), source, weight, inverse_rms,
                torch.empty(source.shape[1]),
            )  # fmt: skip
            if label.endswith(("D16384", "D1536", "D512")):
                yield f"triton rms_norm_backward {kind} {label.split()[-1]}", backward
        weight = torch.empty(7168, dtype=dtype)
        yield (
            f"triton rms_norm_backward {kind}",
            partial(norm.rms_norm_backward, x, x, weight, inverse_rms, torch.empty(7168)),
        )
        yield (
            f"triton rms_norm_backward {kind} residual",
            partial(norm.rms_norm_backward, x, x, weight, inverse_rms, torch.empty(7168), x),
        )
        for power_of_two in (False, True):
            label = f"{kind} {'pow2' if power_of_two else 'fp32scale'}"
            columns = partial(norm.rms_norm_columns, x, weight, inverse_rms, power_of_two=power_of_two)
            yield f"triton rms_norm_columns {label}", columns


def rope_cases() -> Iterator[Case]:
    """Queries and keys of DeepSeek-V3's heads, both ways."""
    rope = importlib.import_module("fp8moe.kernels.triton.rope")
    t, heads = 4096, 128
    angles = torch.empty(t, 32), torch.empty(t, 32)
    for dtype, kind in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        q, kv = torch.empty(t, heads, 192, dtype=dtype), torch.empty(t, heads, 256, dtype=dtype)
        k_rope = torch.empty(t, 2112, dtype=dtype)[:, 2048:]
        yield f"triton rope_queries {kind}", partial(rope.rope_queries, q, *angles)
        yield f"triton rope_queries_backward {kind}", partial(rope.rope_queries_backward, q, *angles)
        yield f"triton rope_keys {kind}", partial(rope.rope_keys, kv, k_rope, *angles, nope_dim=128)
        yield f"triton rope_keys_backward {kind}", partial(rope.rope_keys_backward, q, kv[..., 128:], *angles)


def cases() -> Iterator[Case]:
    """All cases of both device back ends."""
    yield from gemm_cases("gluon")
    yield from gemm_cases("triton")
    yield from unquantized_cases()
    yield from cast_cases()
    yield from permute_cases()
    yield from update_cases()
    yield from loss_cases()
    yield from activation_cases()
    yield from route_cases()
    yield from norm_cases()
    yield from rope_cases()


CASES = tuple(cases())
