"""The registered ops: what tracing sees has the shapes, strides and dtypes of what runs, and computes the same."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fp8moe.kernels import backend, library
from fp8moe.kernels.adamw import adamw_step, adamw_step_quantize
from fp8moe.kernels.cross_entropy import cross_entropy, cross_entropy_with_gradient
from fp8moe.kernels.decode_attention import decode_attention
from fp8moe.kernels.e5m6 import e5m6_to_columns, pack_e5m6, unpack_e5m6
from fp8moe.kernels.embedding import embedding_wgrad
from fp8moe.kernels.expert_bias import add_expert_bias, expert_bias_dgrad, expert_bias_wgrad
from fp8moe.kernels.gemm import gemm, wgrad
from fp8moe.kernels.grouped_gemm import grouped_gemm, grouped_wgrad
from fp8moe.kernels.grouped_mm import grouped_mm, grouped_mm_wgrad
from fp8moe.kernels.message import MessageLayout, pack_message, plan_message, unpack_message
from fp8moe.kernels.norm import rms_norm, rms_norm_backward, rms_norm_columns
from fp8moe.kernels.permute import RowMap, permute, permute_quantize, plan_rows, unpermute
from fp8moe.kernels.quantize import (
    quantize_blocks,
    quantize_columns,
    quantize_rows,
    quantize_rows_and_columns,
    requantize_columns,
)
from fp8moe.kernels.rope import rope_keys, rope_keys_backward, rope_queries, rope_queries_backward
from fp8moe.kernels.route import route, route_backward
from fp8moe.kernels.segments import Segments
from fp8moe.kernels.silu_mul import silu_mul, silu_mul_backward
from fp8moe.kernels.squared_norm import squared_norm
from fp8moe.kernels.swiglu import swiglu, swiglu_backward, swiglu_columns
from tests.kernels.caches import caches_arguments
from tests.kernels.updates import state


@pytest.fixture(params=["reference", "triton"])
def layout(request):
    torch.manual_seed(0)
    backend.set_backend(request.param)
    yield request.param
    backend.set_backend(None)


def parts(*values):
    """The plain tensors inside."""
    return [
        t
        for v in values
        for t in (
            (v,)
            if isinstance(v, torch.Tensor)
            else (v.source_R, v.slot_R, v.group_offsets, v.tokens_per_expert)
            if isinstance(v, RowMap)
            else (v.data, v.scale)
        )
    ]


def every_cast(x, w):
    rows = quantize_rows(x)
    packed = pack_e5m6(x[0])
    return parts(
        rows,
        quantize_columns(x[0], power_of_two=True),
        *quantize_rows_and_columns(x[1], amax_floor=1e-30),
        *quantize_blocks(w),
        requantize_columns(quantize_rows(x[0])),
        packed,
        unpack_e5m6(packed),
        e5m6_to_columns(packed),
    )


def every_product(x, dy, w, offsets, total, totals):
    """One step of an expert Linear; adds into total and totals."""
    rows, (blocks, transposed) = quantize_rows(x), quantize_blocks(w)
    dy_rows, dy_columns = quantize_rows_and_columns(dy, amax_floor=1e-30)
    x_columns = requantize_columns(rows)
    first, back = quantize_blocks(w[0])
    y, dx = grouped_gemm(rows, blocks, offsets), grouped_gemm(dy_rows, transposed, offsets, out_dtype=torch.float32)
    grouped_wgrad(dy_columns, x_columns, offsets, totals)
    gemm(dy_columns, x_columns, accumulate=total)
    wgrad(dy, x, total)
    grouped_mm_wgrad(dy, x, offsets, totals)
    return y, dx, gemm(rows, first), gemm(dy_rows, back, out_dtype=torch.float32), grouped_mm(x, w, offsets)


def every_way(x, ids):
    """Rows to experts and back."""
    row_map = plan_rows(ids, 3, room=512)
    copies = permute(x, row_map)
    rows = permute(quantize_rows(x), row_map)
    return parts(row_map, copies, rows, permute_quantize(x, row_map, power_of_two=True), unpermute(copies, row_map))


def every_message(x, ids, weights):
    """Rows to peers and on to experts, with their ids and without; sums written where they are told."""
    to_peers, made = plan_message(ids, 3, 2, room=96, fixed=True), []
    for rows in (x, quantize_rows(x, power_of_two=True)):
        layout = MessageLayout.of(rows, 2)
        message = pack_message(rows, to_peers, ids, weights, sender=5)
        order = plan_rows(layout.sender_of(message), 7, align=1, room=96, first=-1).source_R
        to_experts = plan_rows(layout.ids_of(message), 2, room=384, first=2, order=order)
        plain = pack_message(rows, to_peers)
        made += [message, to_experts, *unpack_message(message, to_experts, layout), plain]
        made += [unpack_message(plain, replace(to_experts, topk=1), MessageLayout.of(rows))[0]]
    copies, total = permute(x, to_peers), x.new_zeros(40, 160)
    unpermute(copies, to_peers, out=total[:, 8:152])
    return parts(to_peers, *made, total)


def messages_arguments():
    ids = torch.tensor([[0, 5], [2, -1], [3, 2], [4, 1]]).repeat(10, 1)
    return torch.randn(40, 144).bfloat16(), ids, torch.rand(40, 2)


def every_loss(x, w, labels, weight, total):
    """Logits, their losses, their gradients in their place, and the gradient of an embedding."""
    logits = x @ w
    losses, again = logits.new_empty(2, 6, dtype=torch.float32)
    cross_entropy(logits, labels, losses)
    cross_entropy_with_gradient(logits, labels, weight, again)
    embedding_wgrad(logits, labels.clamp(min=0), total)
    return losses, again, logits


def losses_arguments():
    labels = torch.tensor([3, -100, 0, 40, 3, -100])
    return torch.randn(6, 16).bfloat16(), torch.randn(16, 41).bfloat16(), labels, torch.tensor(0.5), torch.zeros(41, 41)


def every_routing(logits, bias, counts, d_weights):
    """Experts chosen and counted, and back."""
    scoring = {"score": "softmax", "normalize": True, "route_scale": 2.0}
    choosing = {"topk": 3, "num_groups": 4, "top_groups": 2, "group_score": "max"}
    options = {"num_sequences": 2, "force_balance": False}
    ids, weights, loss, f = route(logits, bias, counts, **choosing, **scoring, **options)
    _, _, uncounted, _ = route(logits, bias, None, **choosing, **scoring, **options)
    return ids, weights, loss, f, uncounted, route_backward(logits, ids, f, d_weights, loss, **scoring)


def routing_arguments():
    return torch.randn(10, 12), torch.randn(12), torch.zeros(12, dtype=torch.int64), torch.randn(10, 3)


def every_norm(x, weight, delta, main_grad):
    """With and without a residual, each form alone and together; adds into main_grad."""
    h, y, rows, inverse = rms_norm(x, weight, delta, eps=1e-6, rows=True, power_of_two=True)
    _, alone, _, _ = rms_norm(x, weight, eps=1e-6)
    _, _, cast, _ = rms_norm(x, weight, eps=1e-6, tensor=False, rows=True)
    columns = rms_norm_columns(h, weight, inverse)
    dx = rms_norm_backward(y, h, weight, inverse, main_grad)
    return parts(h, y, rows, inverse, alone, cast, columns, dx, rms_norm_backward(y, h, weight, inverse, main_grad, x))


def every_rotation(q, kv, k_rope, cos, sin):
    return (
        rope_queries(q, cos, sin),
        rope_queries_backward(q, cos, sin),
        rope_keys(kv, k_rope, cos, sin, nope_dim=16),
        *rope_keys_backward(q, kv[..., 16:], cos, sin),
    )


def norms_arguments():
    x, delta = torch.randn(2, 48, 144).bfloat16()
    return x, torch.randn(144).bfloat16(), delta, torch.zeros(144)


def rotations_arguments():
    q, kv, k_rope = (torch.randn(size).bfloat16() for size in ((6, 2, 48), (6, 2, 40), (6, 32)))
    return q, kv, k_rope, torch.randn(6, 16), torch.randn(6, 16)


def every_cache(q, keys, values, positions, rows):
    return [decode_attention(q, keys, values, positions, rows, length=190, scale=0.1)]


def ways_arguments():
    return torch.randn(40, 144).bfloat16(), torch.tensor([[0, 2], [2, -1]]).repeat(20, 1)


def casts_arguments():
    return torch.randn(2, 48, 144).bfloat16(), torch.randn(3, 32, 144).bfloat16()


def products_arguments():
    x, dy, w = torch.randn(256, 48).bfloat16(), torch.randn(256, 32).bfloat16(), torch.randn(2, 32, 48).bfloat16()
    return x, dy, w, torch.tensor([0, 128, 256], dtype=torch.int32), torch.zeros(32, 48), torch.zeros(2, 32, 48)


def every_update(master, grad, exp_avg, exp_avg_sq, weight, parts_of_flat):
    """One step of the optimizer, from the norm of its gradient on."""
    settings = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "step": 2}
    total = squared_norm(grad.flatten())
    tensors = (master, grad, exp_avg, exp_avg_sq)
    segments = Segments(((0, 700, True), (700, 2304, False)), parts_of_flat)
    flat = [tensor.flatten() for tensor in tensors]
    adamw_step(*flat, segments, weight.flatten().clone(), **settings)
    adamw_step(*flat, segments, **settings, grad_scale=total.float())
    blocks = quantize_blocks(weight)
    adamw_step_quantize(*tensors, weight, *blocks, **settings)
    return [total, *flat, *parts(*blocks)]


def updates_arguments():
    parts_of_flat = Segments.of([(0, 700, True), (700, 2304, False)], "cpu").parts
    return *state(3, 16, 48), torch.zeros(3, 16, 48).bfloat16(), parts_of_flat


def every_activation(gate_up, dy, weights):
    """SwiGLU with casts and without, weighted and not."""
    results = []
    for factor in (weights, None):
        hidden, cached = swiglu(gate_up, factor)
        grads = [*swiglu_backward(dy, cached, factor, power_of_two=True), *silu_mul_backward(dy, gate_up, factor)]
        results += [hidden, cached, swiglu_columns(cached, factor), silu_mul(gate_up, factor)]
        results += [grad for grad in grads if grad is not None]
    return parts(*results)


def activations_arguments():
    return torch.randn(16, 288).bfloat16(), torch.randn(16, 144).bfloat16(), torch.rand(16)


def every_bias(gate_up, y, weights, bias, down, offsets, totals):
    """Clamped experts with biases; adds into y, weights and totals."""
    hidden, cached = swiglu(gate_up, weights, bias, offsets, limit=7.0)
    rows, columns, d_weights = swiglu_backward(y, cached, weights, limit=7.0)
    plain = silu_mul(gate_up, limit=7.0), silu_mul_backward(y, gate_up, limit=7.0)[0]
    expert_bias_wgrad(columns, offsets, totals)
    expert_bias_wgrad(gate_up, offsets, totals, weights)
    add_expert_bias(y, down, offsets, weights)
    expert_bias_dgrad(y, down, offsets, weights)
    expert_bias_dgrad(quantize_rows(y), down, offsets, weights)
    return parts(hidden, cached, rows, columns, d_weights, *plain, swiglu_columns(cached, limit=7.0))


def biases_arguments():
    gate_up, y = torch.randn(128, 96).bfloat16(), torch.randn(128, 48).bfloat16()
    bias, down = torch.randn(2, 96).bfloat16(), torch.randn(2, 48).bfloat16()
    return gate_up, y, torch.rand(128), bias, down, torch.tensor([0, 128, 128], dtype=torch.int32), torch.zeros(2, 96)


CASES = [
    (every_bias, biases_arguments),
    (every_cast, casts_arguments),
    (every_product, products_arguments),
    (every_way, ways_arguments),
    (every_message, messages_arguments),
    (every_update, updates_arguments),
    (every_loss, losses_arguments),
    (every_activation, activations_arguments),
    (every_routing, routing_arguments),
    (every_norm, norms_arguments),
    (every_rotation, rotations_arguments),
    (every_cache, caches_arguments),
]


def look(tensors):
    return [(t.dtype, tuple(t.shape), t.stride()) for t in tensors]


@pytest.mark.parametrize(("function", "arguments"), CASES)
def test_tensors_without_data_get_the_shapes_and_strides_of_the_real_ones(layout, function, arguments):
    args = arguments()
    real = look(function(*args))
    assert look(function(*(a.to("meta") for a in args))) == real
    with FakeTensorMode() as mode:
        assert look(function(*(mode.from_tensor(a) for a in args))) == real


@pytest.mark.filterwarnings("error:.*may not alias")
@pytest.mark.parametrize(("function", "arguments"), CASES)
def test_compiled_whole_it_computes_the_same(layout, function, arguments):
    torch.manual_seed(1)
    eager_args = arguments()
    compiled_args = [a.clone() for a in eager_args]
    eager = function(*eager_args)
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*compiled_args)
    assert look(compiled) == look(eager)
    for ours, theirs in zip((*compiled, *compiled_args), (*eager, *eager_args), strict=True):
        assert torch.equal(
            ours.contiguous().flatten().view(torch.uint8), theirs.contiguous().flatten().view(torch.uint8)
        )


def test_every_cast_and_product_is_registered():
    registered = {name for name in backend.OPS if name in library.DECLARATIONS}
    assert registered == set(backend.OPS)
    for name in registered:
        assert hasattr(torch.ops.fp8moe, name)


def test_what_an_op_changes_is_declared():
    mutated = {
        name
        for name in library.DECLARATIONS
        if any(a.alias_info is not None for a in getattr(torch.ops.fp8moe, name).default._schema.arguments)
    }
    wgrads = {
        "gemm_add",
        "unpermute_into",
        "wgrad",
        "grouped_wgrad",
        "grouped_mm_wgrad",
        "embedding_wgrad",
        "rms_norm_backward",
    }
    updates = {"adamw_step", "adamw_step_quantize"}
    biases = {"add_expert_bias", *(f"expert_bias_{way}{kind}" for way in ("dgrad", "wgrad") for kind in ("", "_fp8"))}
    assert mutated == wgrads | updates | biases | {"route", "cross_entropy", "cross_entropy_with_gradient"}
