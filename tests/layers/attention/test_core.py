"""Core attention: what its kernels are called with, and its output kept in E5M6 for both backwards that read it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from fp8moe.kernels.e5m6 import pack_e5m6, unpack_e5m6
from fp8moe.kernels.fp8 import Fp8Tensor
from fp8moe.layers.attention import core
from fp8moe.layers.attention.core import BACKENDS
from fp8moe.layers.attention.kept_output import keep_in_e5m6
from fp8moe.layers.attention.mla import LatentAttention, MlaConfig, Positions
from fp8moe.layers.linear import attach_main_grads, quantize_weights
from fp8moe.layers.operand import Activation
from fp8moe.layers.recipe import Precision, Recipe
from fp8moe.layers.recompute import capture_saved
from tests.distance import calc_diff
from tests.layers.attention.test_documents import flash_attn_module

B, S, H, V = 2, 32, 4, 32  # heads of equal size: PyTorch's fused attention on a CPU, which saves its output


def qkv(dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(B, S, H, V).bfloat16().to(dtype).requires_grad_() for _ in range(3)]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return BACKENDS["sdpa"](q, k, v, V**-0.5)


def attention_kept_in_e5m6(attend: Callable[[], Tensor]) -> Activation:
    with capture_saved() as captured:
        out = attend()
    return keep_in_e5m6([out], captured)


def as_rows(out: Tensor) -> Tensor:
    return out.reshape(B * S, H * V)


def test_attentions_backward_reads_the_packed_output() -> None:
    q, k, v = qkv()
    x = attention_kept_in_e5m6(lambda: sdpa(q, k, v))
    dout = torch.randn(B * S, H * V).bfloat16()
    got = torch.autograd.grad(x.autograd_handle, (q, k, v), dout)

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
    got = torch.autograd.grad(x.autograd_handle, inputs, dout)
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
    assert calc_diff(rows.dequantize(), x.autograd_handle.detach()) < 1e-3
    assert calc_diff(columns.dequantize(), unpack_e5m6(pack_e5m6(x.autograd_handle.detach())).T) < 1e-3


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
    x.autograd_handle.sum().backward()
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
        attention_kept_in_e5m6(lambda saver=saver: saver.function(q)).autograd_handle.sum().backward()
        assert torch.equal(saver.given[1], saver.saved)


def layer() -> tuple[LatentAttention, Tensor, Positions]:
    torch.manual_seed(0)
    config = MlaConfig(num_heads=H, q_lora_rank=32, kv_lora_rank=32, nope_dim=16, rope_dim=16, v_dim=V)
    attention = config.build(64, Recipe(Precision.FP8), norm_eps=1e-6, layer=0)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.2)
    attach_main_grads(attention)
    quantize_weights(attention)
    x = torch.randn(B * S, 64).bfloat16().requires_grad_()
    return attention, x, config.positions(torch.arange(S).expand(B, -1))


def test_weight_gradient_of_the_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    attention, x, positions = layer()
    outs: list[Tensor] = []
    inner = BACKENDS["sdpa"]
    monkeypatch.setitem(BACKENDS, "sdpa", lambda *inputs: (outs.append(inner(*inputs)), outs[-1])[1])
    dy = torch.randn(B * S, 64).bfloat16()
    attention(x, positions).backward(dy)
    out, dy64 = as_rows(outs[0].detach()).double(), dy.double()
    main_grad: Tensor = attention.o.weight.main_grad  # type: ignore[assignment]
    assert calc_diff(main_grad, dy64.T @ out, dy64.T, out.T) < 2e-3


def test_without_gradients_nothing_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    attention, x, positions = layer()
    expected = attention(x, positions).detach()
    monkeypatch.setattr("fp8moe.layers.attention.kept_output.pack_e5m6", None)
    with torch.no_grad():
        assert torch.equal(attention(x, positions), expected)
        unasked = keep_in_e5m6([torch.ones(1, 16, 1, 16, dtype=torch.bfloat16)], [])
    with pytest.raises(AssertionError, match="ran without gradients"):
        unasked.operand.columns()
    with pytest.raises(TypeError):
        attention(x, positions)


def test_features_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^K=40 must be a multiple of 16, which FP8 needs: use 32$"):
        attention_kept_in_e5m6(lambda: torch.zeros(1, 16, 5, 8, dtype=torch.bfloat16))


@pytest.mark.parametrize("answer", [lambda out: out, lambda out: (out, None)], ids=["tensor", "tuple"])
def test_flash_attention_is_called_as_its_kernels_want_it(
    answer: Callable[[Tensor], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """[B, S, H, d] as it is, causal, with our softmax scale; some versions return the log-sum-exp beside the output."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    out = torch.randn(B, S, H, V)

    def flash_attn_func(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return answer(out)

    flash_attn_module(monkeypatch, flash_attn_func=flash_attn_func)
    q, k, v = torch.randn(B, S, H, 48), torch.randn(B, S, H, 48), torch.randn(B, S, H, V)
    assert BACKENDS["flash"](q, k, v, 0.125) is out
    ((args, kwargs),) = calls
    assert all(given is ours for given, ours in zip(args, (q, k, v), strict=True))
    assert kwargs == {"softmax_scale": 0.125, "causal": True}


@pytest.mark.parametrize("kernel, backend", [
    ("cudnn", SDPBackend.CUDNN_ATTENTION), ("efficient", SDPBackend.EFFICIENT_ATTENTION)
])  # fmt: skip
def test_a_pinned_kernel_is_the_only_one_allowed(
    kernel: str, backend: SDPBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    allowed = {
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled, "efficient": torch.backends.cuda.mem_efficient_sdp_enabled,
        "flash": torch.backends.cuda.flash_sdp_enabled, "math": torch.backends.cuda.math_sdp_enabled,
    }  # fmt: skip
    before = {name: on() for name, on in allowed.items()}
    monkeypatch.setattr(
        core, "_sdpa", lambda *inputs: (seen.append([n for n, on in allowed.items() if on()]), inputs)[1]
    )
    inputs = tuple(qkv())
    assert BACKENDS[kernel](*inputs, 0.5) == (*inputs, 0.5)
    assert seen == [[kernel]] and {name: on() for name, on in allowed.items()} == before


def test_an_output_that_should_have_been_saved_and_was_not_is_an_error() -> None:
    q = qkv()[0]
    saver = _Saver(by_sequence, lambda out: out.clone())
    with capture_saved() as captured:
        out = saver.function(q)
    with pytest.raises(RuntimeError, match=r"saved 2 tensors and none is its output \[2, 32, 4, 32\].*backend=sdpa"):
        keep_in_e5m6([out], captured, saves_output=True)
    with capture_saved() as captured:
        out = sdpa(*qkv())
    keep_in_e5m6([out], captured, saves_output=True)
    assert sum(saved.tensor is None for saved in captured) == 1
    with capture_saved() as captured:
        out = sdpa(*(t.detach() for t in qkv()))
    keep_in_e5m6([out], captured, saves_output=True)  # nothing asks for gradients, nothing was saved
