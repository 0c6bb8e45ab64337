"""Sinks and windows against a dense softmax in FP64: values and gradients, with and without documents, by kernels."""

from __future__ import annotations

import functools
import math
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fp8moe.layers.attention import GqaConfig, blocked, core
from fp8moe.layers.attention.choice import AUTO, Heads, Machine, choose, chosen, why_not
from fp8moe.layers.attention.core import Positions, attend
from fp8moe.layers.attention.documents import Documents
from fp8moe.layers.attention.sinks import make_sinks, widened, with_sinks
from fp8moe.layers.attention.yarn import YarnConfig, yarn_frequencies
from fp8moe.layers.linear import attach_main_grads, main_grad_of, quantize_weights
from fp8moe.layers.phase import DeferredWgrads
from fp8moe.layers.recipe import Precision, Recipe
from tests.distance import calc_diff

B, H, D, V = 2, 6, 16, 16


def positions(seq_len: int, documents: bool) -> Positions:
    turns = torch.zeros(B * seq_len, 4)
    if not documents:
        return Positions(B, turns, turns)
    lengths = [seq_len // 3 + (i < seq_len % 3) for i in range(3)] + [seq_len - seq_len // 2, seq_len // 2]
    return Positions(B, turns, turns, Documents(tuple(n for n in lengths if n), turns.device))


def dense(
    q: Tensor, k: Tensor, v: Tensor, scale: float, at: Positions, window: int | None, sinks: Tensor | None
) -> Tensor:
    """The softmax of all scores and the sink, written out."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    i, j = torch.arange(q.shape[1])[:, None], torch.arange(q.shape[1])
    seen = (j <= i)[None] if window is None else ((j <= i) & (i - j < window))[None]
    if at.documents is not None:
        numbers = [n for n, length in enumerate(at.documents.lengths) for _ in range(length)]
        numbers_BS = torch.tensor(numbers).view(len(q), -1)
        seen = seen & (numbers_BS[:, :, None] == numbers_BS[:, None, :])
    scores = (torch.einsum("bshd,bthd->bhst", q, k) * scale).masked_fill(~seen[:, None], float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    return torch.einsum("bhst,bthd->bshd", scores.softmax(-1)[..., : q.shape[1]], v)


def inputs(seq_len: int, dtype: torch.dtype, heads_of_keys: int, v_dim: int = V) -> list[Tensor]:
    torch.manual_seed(seq_len)
    shapes = (H, D), (heads_of_keys, D), (heads_of_keys, v_dim)
    made = [torch.randn(B, seq_len, *shape).to(dtype) for shape in shapes]
    return [x.requires_grad_() for x in (*made, torch.randn(H) * 2)]


def check(kernel: str, seq_len: int, window: int | None, documents: bool, sinks: bool, **options: Any) -> None:
    dtype = options.get("dtype", torch.float32)
    given = inputs(seq_len, dtype, options.get("heads_of_keys", H), options.get("v_dim", V))
    exact, at = [x.detach().double().requires_grad_() for x in given], positions(seq_len, documents)
    out = attend(kernel, *given[:3], 0.3, at, window=window, sinks=given[3] if sinks else None)
    expected = dense(*exact[:3], 0.3, at, window, exact[3] if sinks else None)
    assert out.dtype is dtype and out.shape == expected.shape
    dy, taken = torch.randn(expected.shape).to(dtype), 4 if sinks else 3
    found = torch.autograd.grad(out, given[:taken], dy)
    wanted = torch.autograd.grad(expected, exact[:taken], dy.double())
    bound = 1e-6 if dtype is torch.float32 else 1e-2
    for got, want in zip((out, *found), (expected, *wanted), strict=True):
        assert (got.double() - want).norm() <= bound * want.norm() + 1e-9


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("window", [None, 1, 7, 64, 100, 1000])
@pytest.mark.parametrize("seq_len", [1, 70, 150])
def test_blocks_of_queries(seq_len: int, window: int | None, documents: bool) -> None:
    for sinks, heads_of_keys in ((True, 2), (True, 6), (False, 3)):
        check("blocked", seq_len, window, documents, sinks, heads_of_keys=heads_of_keys)


@pytest.mark.parametrize("scores", [1, 1 << 14])
def test_blocks_of_queries_in_bf16_and_by_few_heads(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "_SCORES", scores)
    torch.use_deterministic_algorithms(True)  # which fills unwritten memory with NaN
    try:
        check("blocked", 130, 20, True, True, dtype=torch.bfloat16, heads_of_keys=2, v_dim=8)
        check("blocked", 130, None, False, True, v_dim=8)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("window", [None, 5, 100])
def test_sdpa_by_its_windows_and_documents(window: int | None, documents: bool) -> None:
    check("sdpa", 70, window, documents, False, heads_of_keys=2)


def flex_by_hand(
    q: Tensor, k: Tensor, v: Tensor, *, block_mask: Any, scale: float, enable_gqa: bool, return_aux: Any
) -> tuple[Tensor, Any]:
    """FlexAttention's contract, differentiable here: the output and the log-sum-exp of scores, of [B, H, S, d]."""
    assert enable_gqa and return_aux.lse
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    index = [torch.arange(n) for n in (q.shape[0], 1, q.shape[2], q.shape[2])]
    seen = block_mask.mask_mod(*torch.meshgrid(*index, indexing="ij"))
    scores = (q @ k.mT * scale).masked_fill(~seen, float("-inf"))
    return scores.softmax(-1) @ v, SimpleNamespace(lse=scores.logsumexp(-1))


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("window", [None, 5])
def test_sinks_behind_a_kernel_that_returns_its_log_sum_exp(
    window: int | None, documents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core, "_compiled_flex_attention", lambda: flex_by_hand)
    check("flex", 70, window, documents, True, heads_of_keys=2)


@pytest.mark.parametrize("documents", [False, True])
def test_flex_attention_itself_has_the_window_and_a_natural_log_sum_exp(
    documents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(core, "_compiled_flex_attention", lambda: flex_attention)
    (*qkv, sinks), at = [x.detach() for x in inputs(70, torch.float32, 2)], positions(70, documents)
    for given in (None, sinks):
        out = attend("flex", *qkv, 0.3, at, window=9, sinks=given)
        assert (out - dense(*qkv, 0.3, at, 9, given)).abs().max() < 1e-5


def test_flash_attention_is_told_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []
    module = SimpleNamespace(flash_attn_func=lambda q, k, v, **options: told.append(options) or q)
    module.flash_attn_varlen_func = None
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(cute=module))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", module)
    qkv = [x.detach() for x in inputs(16, torch.bfloat16, 2)[:3]]
    for window in (None, 5, 16):
        attend("flash", *qkv, 0.3, positions(16, False), window=window)
    assert [options.get("window_size") for options in told] == [None, (4, 0), None]


def test_large_sinks_and_scores_stay_finite() -> None:
    out, lse = torch.randn(1, 3, 2, 4).requires_grad_(), torch.tensor([[[-500.0, 500.0]] * 3]).requires_grad_()
    sinks = torch.tensor([300.0, -300.0]).requires_grad_()
    y = with_sinks(out, lse, sinks)
    y.sum().backward()
    assert torch.equal(y[:, :, 1], out[:, :, 1]) and not bool(y[:, :, 0].any())
    assert all(bool(x.grad.isfinite().all()) for x in (out, lse, sinks))  # type: ignore[union-attr]


def test_the_sinks_gradient_is_fp32_and_waits() -> None:
    module = nn.Module()
    module.sinks = make_sinks(3, Recipe(Precision.BF16))
    module.sinks.data.normal_()
    attach_main_grads(module)
    gradient, wgrads = torch.tensor([1.0, 1 + 2.0**-20, 3.0]), DeferredWgrads()
    with wgrads.collect():
        widened(module.sinks).backward(gradient)
    assert not bool(main_grad_of(module.sinks).any())
    wgrads.run()
    assert torch.equal(main_grad_of(module.sinks), gradient) and module.sinks.grad is None
    assert module.sinks.initial_value == 0.0


CPU, BARE = Machine("cpu"), Machine("cuda", (9, 0), frozenset({"cudnn", "efficient"}), None)
GPU = replace(BARE, triton=True, varlen=frozenset({"plain", "grouped"}))
SINKS = Heads(64, 64, torch.bfloat16, False, 8, 128, True)


def test_which_kernel_computes_sinks_and_windows() -> None:
    windowed = replace(SINKS, sinks=False)
    assert [choose(AUTO, SINKS, machine) for machine in (CPU, GPU)] == ["blocked", "flex"]
    assert [choose(AUTO, replace(SINKS, masked=True), machine) for machine in (CPU, GPU)] == ["blocked", "flex"]
    assert [choose(AUTO, windowed, machine) for machine in (CPU, GPU, BARE)] == ["sdpa", "varlen", "flash"]
    assert why_not("flash", windowed, GPU) is None
    assert str(SINKS) == "64/64 heads, 8 queries a key, causal, windows of 128, with sinks"
    for kernel in ("sdpa", "cudnn", "flash"):
        with pytest.raises(ValueError, match=rf"backend={kernel} cannot run .* sinks.*: use .*backend=flex$"):
            choose(kernel, SINKS, GPU)
    with pytest.raises(ValueError, match=r"auto finds no kernel for .* \(FlexAttention: it needs Triton\): install"):
        choose(AUTO, SINKS, BARE)
    assert not chosen(AUTO, SINKS, torch.device("cpu")).saves_output


CONFIG = GqaConfig(
    num_heads=6, num_kv_heads=2, head_dim=16, rope_dim=16, qkv_bias=True, o_bias=True, window=5, window_layers="even",
    sinks=True,
)  # fmt: skip


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("layer", [0, 1])
def test_the_layer_hands_over_its_window_and_its_sinks(
    layer: int, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = CONFIG.build(48, Recipe(precision), norm_eps=1e-6, layer=layer)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.2)
    attach_main_grads(attention)
    quantize_weights(attention)
    handed: list[tuple[Any, ...]] = []
    original = core.attend

    @functools.wraps(original)
    def noting(kernel: str, q: Tensor, k: Tensor, v: Tensor, scale: float, at: Positions, **options: Any) -> Tensor:
        handed.append((kernel, options["window"], options["sinks"]))
        out = original(kernel, q, k, v, scale, at, **options)
        expected = dense(*(x.detach().double() for x in (q, k, v)), scale, at, options["window"], options["sinks"])
        assert calc_diff(out.detach(), expected.detach()) < 1e-4
        return out

    monkeypatch.setattr("fp8moe.layers.attention.gqa.attend", noting)
    at = CONFIG.positions(torch.arange(24).expand(2, 24))
    attention(torch.randn(48, 48).to(precision.dtype).requires_grad_(), at).sum().backward()
    ((kernel, window, sinks),) = handed
    assert kernel == "blocked" and window == (5 if layer == 0 else None) and torch.equal(sinks, attention.sinks.float())
    assert all(bool(main_grad_of(parameter).any()) for parameter in attention.parameters())


def test_a_ramp_that_is_not_truncated_ends_where_the_rotations_say() -> None:
    """GPT-OSS's: against the formula of its release, in FP64."""
    dim, theta, yarn = 64, 150000.0, YarnConfig(factor=32.0, mscale_all=0.0, truncate=False)
    low, high = (dim * math.log(4096 / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (32.0, 1.0))
    kept = theta ** -(torch.arange(0, dim, 2).double() / dim)
    ramp = ((torch.arange(dim // 2).double() - low) / (high - low)).clamp(0, 1)
    expected = kept / 32 * ramp + kept * (1 - ramp)
    torch.testing.assert_close(yarn_frequencies(dim, theta, yarn), expected.float(), rtol=1e-5, atol=0)
    assert not torch.allclose(yarn_frequencies(dim, theta, replace(yarn, truncate=True)), expected.float(), rtol=1e-3)
    assert yarn.amplitude == pytest.approx(0.1 * math.log(32.0) + 1) and yarn.softmax_factor == 1
