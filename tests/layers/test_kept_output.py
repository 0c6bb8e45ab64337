"""Attention's output kept in E5M6: what both backwards get of it, and that nobody keeps the BF16 tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fp8moe.kernels.e5m6 import pack_e5m6, unpack_e5m6
from fp8moe.kernels.fp8 import Fp8Tensor
from fp8moe.layers.attention import mla as attention_module
from fp8moe.layers.attention.mla import AttentionConfig, LatentAttention, Positions
from fp8moe.layers.linear import quantize_weights
from fp8moe.layers.operand import Activation
from fp8moe.layers.recipe import Precision
from fp8moe.layers.recompute import capture_saved, keep_in_e5m6
from fp8moe.layers.rope import inverse_frequencies, rotation
from fp8moe.layers.wgrad import attach_main_grads
from tests.distance import calc_diff

B, S, H, V = 2, 32, 4, 32  # heads of equal size: PyTorch's fused attention on a CPU, which saves its output


def qkv(dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(B, S, H, V).bfloat16().to(dtype).requires_grad_() for _ in range(3)]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention_module._sdpa(q, k, v, V**-0.5, None)


def attention_kept_in_e5m6(attend: Callable[[], Tensor]) -> Activation:
    with capture_saved() as boxes:
        out = attend()
    return keep_in_e5m6(out, boxes)


def as_rows(out: Tensor) -> Tensor:
    return out.reshape(B * S, H * V)


def test_attentions_backward_reads_the_packed_output() -> None:
    q, k, v = qkv()
    x = attention_kept_in_e5m6(lambda: sdpa(q, k, v))
    dout = torch.randn(B * S, H * V).bfloat16()
    got = torch.autograd.grad(x.edge, (q, k, v), dout)

    by_head = [t.detach().transpose(1, 2) for t in (q, k, v)]
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, logsumexp = fused(*by_head, 0.0, True, scale=V**-0.5)
    kept = unpack_e5m6(pack_e5m6(as_rows(out.transpose(1, 2))))
    kept_out, d = (t.view(B, S, H, V).transpose(1, 2) for t in (kept, dout))
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    expected = backward(d, *by_head, kept_out, logsumexp, 0.0, True, scale=V**-0.5)
    assert all(torch.equal(a, b.transpose(1, 2)) for a, b in zip(got, expected, strict=True))
    assert not torch.equal(kept, as_rows(out.transpose(1, 2))), "the format must have cost something to be seen"


def test_gradients_against_fp64() -> None:
    dout = torch.randn(B * S, H * V, generator=torch.Generator().manual_seed(1)).bfloat16()
    inputs = qkv()
    x = attention_kept_in_e5m6(lambda: sdpa(*inputs))
    got = torch.autograd.grad(x.edge, inputs, dout)
    plain = torch.autograd.grad(as_rows(sdpa(*inputs)), inputs, dout)
    exact_inputs = qkv(torch.float64)
    exact = torch.autograd.grad(as_rows(sdpa(*exact_inputs)), exact_inputs, dout.double())
    for mine, bf16, fp64 in zip(got, plain, exact, strict=True):
        # Seven bits of the output, and only the row sums of dO x O feel them; E4M3's four would cost 64 times as much.
        assert calc_diff(mine, bf16) < 3e-5 and calc_diff(mine, fp64) < 3e-5


def test_rows_and_columns_of_the_output() -> None:
    q, k, v = qkv()
    x = attention_kept_in_e5m6(lambda: sdpa(q, k, v))
    rows, columns = x.operand.rows, x.operand.columns()
    assert isinstance(rows, Fp8Tensor) and isinstance(columns, Fp8Tensor)
    for cast in (rows, columns):
        assert bool((torch.frexp(cast.scale).mantissa == 0.5).all())
    assert calc_diff(rows.dequantize(), x.edge.detach()) < 1e-3
    assert calc_diff(columns.dequantize(), unpack_e5m6(pack_e5m6(x.edge.detach())).T) < 1e-3


class _Saver(nn.Module):
    """out = 3 q, whose backward tells which tensor it was given back; `saved` makes of the output what is saved."""

    def __init__(self, make: Callable[[Tensor], Tensor], saved: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        outer = self

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, q: Tensor) -> Tensor:
                out = make(3 * q)
                ctx.save_for_backward(q, saved(out))
                outer.saved = saved(out)
                return out

            @staticmethod
            def backward(ctx: Any, *grads: Tensor) -> Tensor:
                outer.given = ctx.saved_tensors
                return 3 * grads[0]

        self.function = Function.apply


def by_sequence(t: Tensor) -> Tensor:
    return t.contiguous()


def by_head(t: Tensor) -> Tensor:
    return t.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("make, saved", [
    (by_sequence, lambda out: out),
    (by_sequence, lambda out: out.transpose(1, 2)),
    (by_sequence, lambda out: out.view(-1)),
    (by_head, lambda out: out),
    (by_head, lambda out: out.transpose(1, 2)),
])  # fmt: skip
def test_any_view_of_the_output_comes_back_as_it_was(
    make: Callable[[Tensor], Tensor], saved: Callable[[Tensor], Tensor]
) -> None:
    q = qkv()[0]
    saver = _Saver(make, saved)
    x = attention_kept_in_e5m6(lambda: saver.function(q))
    x.edge.sum().backward()
    q_given, given = saver.given
    assert q_given.data_ptr() == q.data_ptr()
    assert given.data_ptr() != saver.saved.data_ptr()
    assert given.shape == saver.saved.shape and given.stride() == saver.saved.stride()
    exact = unpack_e5m6(pack_e5m6(as_rows(3 * q.detach()))).view(B, S, H, V)
    assert torch.equal(given, saved(make(exact)))


def test_what_is_not_the_output_is_left_alone() -> None:
    q = qkv()[0]
    for saved in (lambda out: out[:, 1:], lambda out: out.clone(), lambda out: out[..., :16]):
        saver = _Saver(by_sequence, saved)
        attention_kept_in_e5m6(lambda saver=saver: saver.function(q)).edge.sum().backward()
        assert torch.equal(saver.given[1], saver.saved)


def layer(precision: Precision) -> tuple[LatentAttention, Tensor, Positions]:
    torch.manual_seed(0)
    config = AttentionConfig(
        dim=64, num_heads=H, q_lora_rank=32, kv_lora_rank=32, nope_dim=16, rope_dim=16, v_dim=V, softmax_scale=V**-0.5,
        norm_eps=1e-6,
    )  # fmt: skip
    attention = LatentAttention(config, precision=precision)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.2)
    attach_main_grads(attention)
    quantize_weights(attention)
    cos, sin = rotation(torch.arange(S).repeat(B), inverse_frequencies(16, 1e4))
    return attention, torch.randn(B * S, 64).to(precision.dtype).requires_grad_(), Positions(B, cos, sin)


@pytest.mark.parametrize("precision, alive", [(Precision.BF16, True), (Precision.FP8, False)])
def test_the_bf16_output_dies_with_the_forward(precision: Precision, alive: bool) -> None:
    attention, x, positions = layer(precision)
    seen: list[StorageWeakRef] = []
    inner = attention.attend

    def watched(*inputs: Any) -> Tensor:
        out = inner(*inputs)
        assert out.grad_fn is not None and "FlashAttention" in out.grad_fn.next_functions[0][0].name()
        seen.append(StorageWeakRef(out.untyped_storage()))
        return out

    attention.attend = watched
    y = attention(x, positions)
    assert seen[0].expired() is not alive
    y.sum().backward()


def test_weight_gradient_of_the_projection() -> None:
    attention, x, positions = layer(Precision.FP8)
    outs: list[Tensor] = []
    inner = attention.attend
    attention.attend = lambda *inputs: outs.append(inner(*inputs)) or outs[-1]  # type: ignore[func-returns-value]
    dy = torch.randn(B * S, 64).bfloat16()
    attention(x, positions).backward(dy)
    out, dy64 = as_rows(outs[0].detach()).double(), dy.double()
    main_grad: Tensor = attention.o.weight.main_grad  # type: ignore[assignment]
    assert calc_diff(main_grad, dy64.T @ out, dy64.T, out.T) < 2e-3


def test_without_gradients_nothing_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    attention, x, positions = layer(Precision.FP8)
    expected = attention(x, positions).detach()
    monkeypatch.setattr("fp8moe.layers.recompute.pack_e5m6", None)
    with torch.no_grad():
        assert torch.equal(attention(x, positions), expected)
    with pytest.raises(TypeError):
        attention(x, positions)


def test_features_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="FP8 sizes are multiples of 16, K=40 is not: use 32"):
        attention_kept_in_e5m6(lambda: torch.zeros(1, 16, 5, 8, dtype=torch.bfloat16))
