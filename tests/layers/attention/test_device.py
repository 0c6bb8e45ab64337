"""Attention's kernels on a GPU: each against FP64, with documents and without, at DeepSeek-V3's heads; E5M6 is kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fp8moe.layers.attention.choice import AUTO, Choice, Heads, choose, chosen, machine_of, why_not
from fp8moe.layers.attention.core import Positions, attend
from fp8moe.layers.attention.documents import Documents
from fp8moe.layers.attention.gqa import GqaConfig
from fp8moe.layers.attention.kept_output import keep_in_e5m6
from fp8moe.layers.attention.mla import MlaConfig
from fp8moe.layers.linear import attach_main_grads, quantize_weights
from fp8moe.layers.recipe import FULL_RECOMPUTE, Precision, Recipe
from fp8moe.layers.recompute import capture_saved
from tests.distance import calc_diff

pytestmark = pytest.mark.gpu
B, S, H = 2, 320, 4
LENGTHS = (100, 100, 100, 20, 1, 319)


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    torch.manual_seed(0)
    return torch.device("cuda", torch.cuda.current_device())


def positions(device: torch.device, masked: bool) -> Positions:
    nothing = torch.empty(B * S, 0, device=device)
    return Positions(B, nothing, nothing, Documents(LENGTHS, device) if masked else None)


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float, masked: bool, dout: Tensor) -> list[Tensor]:
    """Output and gradients by attention's formula in FP64."""
    inputs = [t.detach().double().requires_grad_() for t in (q, k, v)]
    keys, values = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in inputs[1:])
    lengths = LENGTHS if masked else (S, S)
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).view(B, S).to(q.device)
    seen = (numbers[:, :, None] == numbers[:, None, :]) & torch.ones(S, S, dtype=torch.bool, device=q.device).tril()
    scores = torch.einsum("bshd,bthd->bhst", inputs[0], keys) * scale
    weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
    out = torch.einsum("bhst,bthd->bshd", weights, values)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout.double())]


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])
@pytest.mark.parametrize("dims", [(192, 128, 1), (128, 128, 1), (48, 32, 1), (128, 128, 4), (64, 64, 2)], ids=str)
@pytest.mark.parametrize("kernel", ["cudnn", "efficient", "varlen", "flex", "flash", "sdpa"])
def test_values_and_gradients(cuda: torch.device, kernel: str, dims: tuple[int, int, int], masked: bool) -> None:
    """dims: of a query or key, of a value, and query heads that share a key."""
    qk_dim, v_dim, group = dims
    heads = Heads(qk_dim, v_dim, torch.bfloat16, masked, group)
    machine = machine_of(cuda, heads)
    if (reason := why_not(kernel, heads, machine)) is not None:
        pytest.skip(reason)
    sizes = (H, qk_dim), (H // group, qk_dim), (H // group, v_dim)
    q, k, v = (torch.randn(B, S, *size, device=cuda).bfloat16().requires_grad_() for size in sizes)
    dout = torch.randn(B, S, H, v_dim, device=cuda).bfloat16()
    out = attend(kernel, q, k, v, qk_dim**-0.5, positions(cuda, masked))
    got = [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]
    for ours, expected in zip(got, exact(q, k, v, qk_dim**-0.5, masked, dout), strict=True):
        assert ours.shape == expected.shape and calc_diff(ours, expected) < 5e-5


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])
def test_auto_is_fused_at_the_heads_of_deepseek_v3(cuda: torch.device, masked: bool) -> None:
    heads = Heads(192, 128, torch.bfloat16, masked)
    kernel = choose(AUTO, heads, machine_of(cuda, heads))
    assert kernel in (("flash", "flex") if masked else ("cudnn", "flash")), kernel
    assert chosen(AUTO, heads, cuda) == Choice(kernel, saves_output=True)


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])
@pytest.mark.parametrize("kernel", ["cudnn", "efficient", "varlen", "flex", "flash"])
def test_the_output_is_kept_packed(cuda: torch.device, kernel: str, masked: bool) -> None:
    """Each kernel saves its output where it is found, and its backward takes the unpacked copy."""
    qk_dim = 128 if kernel == "varlen" else 192
    heads = Heads(qk_dim, 128, torch.bfloat16, masked)
    if (reason := why_not(kernel, heads, machine_of(cuda, heads))) is not None:
        pytest.skip(reason)
    q, k, v = (torch.randn(B, S, H, d, device=cuda).bfloat16().requires_grad_() for d in (qk_dim, qk_dim, 128))
    dout = torch.randn(B * S, H * 128, device=cuda).bfloat16()
    where = positions(cuda, masked)
    plain = attend(kernel, q, k, v, qk_dim**-0.5, where)
    expected = torch.autograd.grad(plain.flatten(0, 1).flatten(1), (q, k, v), dout)
    with capture_saved() as captured:
        out = attend(kernel, q, k, v, qk_dim**-0.5, where)
    kept = keep_in_e5m6([out], captured, saves_output=True)
    assert sum(saved.tensor is None for saved in captured) == 1
    got = torch.autograd.grad(kept.autograd_handle, (q, k, v), dout)
    assert all(calc_diff(ours, theirs) < 1e-4 for ours, theirs in zip(got, expected, strict=True))
    assert not torch.equal(got[0], expected[0]), "the format must have cost something to be seen"


LAYERS = {
    "mla": MlaConfig(num_heads=H, q_lora_rank=128, kv_lora_rank=128, nope_dim=128, rope_dim=64, v_dim=128),
    "gqa": GqaConfig(num_heads=H, num_kv_heads=2, head_dim=128, rope_dim=64, qk_norm="head", qkv_bias=True),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])
def test_a_layer_recomputes_its_heads(cuda: torch.device, masked: bool, kind: str) -> None:
    """FP8 with everything recomputed gives the bits of FP8 with nothing recomputed."""
    config = LAYERS[kind]
    places = torch.arange(S, device=cuda).expand(B, -1)
    where = config.positions(places, LENGTHS if masked else None)
    x = torch.randn(B * S, 256, device=cuda).bfloat16()
    grads = []
    for recompute in (frozenset(), FULL_RECOMPUTE):
        torch.manual_seed(1)
        with cuda:
            attention = config.build(256, Recipe(Precision.FP8, recompute), norm_eps=1e-6, layer=0)
        for parameter in attention.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        attach_main_grads(attention)
        quantize_weights(attention)
        inputs = x.clone().requires_grad_()
        attention(inputs, where).square().sum().backward()
        grads.append(inputs.grad)
    assert grads[0] is not None and torch.equal(*grads)
