"""What is launched for the compile gate of the fused ops: optimizer, losses, SwiGLU, routing, norms, RoPE."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fp8moe.kernels.segments import Segments
from tests.kernels.caches import Sizes
from tests.kernels.sm90_cases import GROUPS, Case, blocks, rows

# SwiGLU: label, dtype, F, weighted, power of two. 320 is no multiple of 128: one tile holds both gate and up.
ACTIVATIONS = (
    ("bf16 fp32scale", torch.bfloat16, 256, True, False),
    ("bf16 pow2", torch.bfloat16, 256, True, True),
    ("fp32 fp32scale", torch.float32, 256, True, False),
    ("bf16 plain", torch.bfloat16, 256, False, False),
    ("bf16 F320", torch.bfloat16, 320, True, False),
)
# Clamped, with biases of experts, at sizes that are and are not multiples of 128: GPT-OSS has 2880.
CLAMPED = (
    ("clamped bf16 pow2", torch.bfloat16, 256, True, True),
    ("clamped bf16 F320", torch.bfloat16, 320, True, False),
)
LIMIT = 7.0
RECOMPUTED = ("bf16 fp32scale", "bf16 plain")  # what makes other columns of the cached copy
UNCAST = (*RECOMPUTED, "fp32 fp32scale")  # what differs without casts


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


def clamped_cases() -> Iterator[Case]:
    """The same, clamped and with biases of experts; and the ops of those biases."""
    fused = importlib.import_module("fp8moe.kernels.triton.swiglu")
    plain = importlib.import_module("fp8moe.kernels.triton.silu_mul")
    ops = importlib.import_module("fp8moe.kernels.triton.expert_bias")
    r, groups = 4096, torch.zeros(GROUPS + 1, dtype=torch.int32)
    for label, dtype, f, _, power_of_two in CLAMPED:
        gate_up, dy, weights, cached = (
            torch.empty(r, 2 * f, dtype=dtype), torch.empty(r, f, dtype=dtype), torch.empty(r), rows(r, 2 * f)
        )  # fmt: skip
        bias, kind = torch.empty(GROUPS, 2 * f, dtype=dtype), {"limit": LIMIT, "power_of_two": power_of_two}
        yield f"triton swiglu {label}", partial(fused.swiglu, gate_up, weights, bias, groups, **kind)
        yield f"triton swiglu_backward {label}", partial(fused.swiglu_backward, dy, cached, weights, **kind)
        yield f"triton swiglu_columns {label}", partial(fused.swiglu_columns, cached, weights, limit=LIMIT)
    back = partial(_there_and_back, plain, dy, gate_up, weights, limit=LIMIT)
    yield "triton silu_mul clamped bf16", back
    for dtype, kind in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        y, bias = torch.empty(r, 2880, dtype=dtype), torch.empty(GROUPS, 2880, dtype=dtype)
        yield f"triton add_expert_bias {kind}", partial(ops.add_expert_bias, y, bias, groups, weights)
        yield f"triton expert_bias_dgrad {kind}", partial(ops.expert_bias_dgrad, y, bias, groups, weights)
        total = torch.empty(GROUPS, 2880)
        yield f"triton expert_bias_wgrad {kind}", partial(ops.expert_bias_wgrad, y, groups, total, weights)
    bias = bias.bfloat16()
    yield "triton expert_bias_dgrad fp8", partial(ops.expert_bias_dgrad, rows(r, 2880), bias, groups, weights)
    summed = partial(ops.expert_bias_wgrad, rows(2880, r), groups, total, weights)
    yield "triton expert_bias_wgrad fp8", summed


def _there_and_back(ops: Any, dy: Tensor, gate_up: Tensor, weights: Tensor | None, limit: float | None = None) -> None:
    ops.silu_mul(gate_up, weights, limit=limit)
    ops.silu_mul_backward(dy, gate_up, weights, limit=limit)


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
            "tensor of heads D128": (torch.empty(m * 32, 128, dtype=dtype), None, {}),
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
                norm.rms_norm_backward, torch.empty(source.shape, dtype=dtype), source, weight,
                torch.empty(len(source)), torch.empty(source.shape[1]),
            )  # fmt: skip
            if label.endswith(("D16384", "D1536", "D512", "D128")):
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


# DeepSeek-V2-Lite's and Moonlight's latents, a token and two; DeepSeek-V3's; Qwen3-30B's heads; GPT-OSS's.
DECODED = {
    "latents H16": Sizes(64, 1, 16, 1, 576, 512, 4096, rows=True),
    "latents H16 S2": Sizes(64, 2, 16, 1, 576, 512, 4096),
    "latents H128": Sizes(8, 1, 128, 1, 576, 512, 4096, rows=True),
    "heads D128": Sizes(64, 1, 32, 4, 128, 128, 4096, rows=True),
    "heads D64 window": Sizes(64, 1, 64, 8, 64, 64, 4096, window=128, sinks=True),
    "heads D128 S9": Sizes(4, 9, 32, 4, 128, 128, 4096, rows=True),
}


def decode_cases() -> Iterator[Case]:
    """Attention to caches, whose entries nobody reads: rows behind the first take no memory."""
    decode = importlib.import_module("fp8moe.kernels.triton.decode_attention")
    for name, of in DECODED.items():
        if of.latents:
            keys = torch.empty(1, of.length, 1, of.d, dtype=torch.bfloat16).expand(of.b, -1, -1, -1)
            values = keys[..., : of.v]
        else:
            entries = torch.empty(1, of.length, 2, of.g, of.d, dtype=torch.bfloat16)
            keys, values = entries.expand(of.b, -1, -1, -1, -1).unbind(2)
        yield (
            f"triton decode_attention {name}",
            partial(
                decode.decode_attention, torch.empty(of.b, of.s, of.h, of.d, dtype=torch.bfloat16), keys, values,
                torch.empty(of.b, of.s, dtype=torch.int64), torch.empty(of.b, dtype=torch.int64) if of.rows else None,
                torch.empty(of.h) if of.sinks else None, length=of.length, scale=of.d**-0.5, window=of.window,
            ),
        )  # fmt: skip


def cases() -> Iterator[Case]:
    """All of them."""
    yield from update_cases()
    yield from loss_cases()
    yield from activation_cases()
    yield from clamped_cases()
    yield from route_cases()
    yield from norm_cases()
    yield from rope_cases()
    yield from decode_cases()
