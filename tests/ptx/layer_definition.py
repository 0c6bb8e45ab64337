"""The layer of `layer_step` as the DeepSeek-V3 report writes it, in FP64, its gradients by autograd.

Nothing of the project computes here: sums over tokens and heads are written out, each expert multiplies the tokens that
chose it. The choice itself is given, since a score that lies near another one decides by its last bits.

Legend: B sequences, S tokens, T = B x S, D model, H heads, E experts, K top-k.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from tests.ptx.layer_step import BALANCE_WEIGHT, CONFIG, LENGTH, SEQUENCES, Layer, Stepped

Weights = dict[str, Tensor]


def norm(x: Tensor, gain: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + CONFIG.norm_eps).sqrt() * gain


def rotate(x_BSHR: Tensor) -> Tensor:
    """Neighbours (2i, 2i + 1) turned by s theta^(-2i / R): section 2.1.1, as DeepSeek's code pairs them."""
    rope = x_BSHR.shape[-1]
    turns = CONFIG.attention.rope_theta ** (-torch.arange(0, rope, 2, dtype=torch.float64) / rope)
    angles = (torch.arange(LENGTH, dtype=torch.float64)[:, None] * turns)[:, None]
    turned = torch.view_as_complex(x_BSHR.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(-2)


def attention(x_TD: Tensor, w: Weights) -> Tensor:
    c = CONFIG.attention
    latents = (x_TD @ w["attn.qkv_a.weight"].T).split([c.q_lora_rank, c.kv_lora_rank, c.rope_dim], dim=-1)
    q = norm(latents[0], w["attn.q_norm.weight"]) @ w["attn.q_b.weight"].T
    kv = norm(latents[1], w["attn.kv_norm.weight"]) @ w["attn.kv_b.weight"].T
    q = q.view(SEQUENCES, LENGTH, c.num_heads, c.qk_dim)
    kv = kv.view(SEQUENCES, LENGTH, c.num_heads, c.nope_dim + c.v_dim)
    k_rope = rotate(latents[2].reshape(SEQUENCES, LENGTH, 1, c.rope_dim))
    scores = torch.einsum("bshd,bthd->bhst", q[..., : c.nope_dim], kv[..., : c.nope_dim])
    scores = scores + torch.einsum("bshd,btd->bhst", rotate(q[..., c.nope_dim :]), k_rope[:, :, 0])
    later = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    shares = (scores * c.qk_dim**-0.5).masked_fill(later, float("-inf")).softmax(-1)
    out = torch.einsum("bhst,bthv->bshv", shares, kv[..., c.nope_dim :])
    return out.flatten(0, 1).flatten(1) @ w["attn.o.weight"].T


def gated(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (x @ gate_up.T).chunk(2, dim=-1)
    return silu(gate) * up @ down.T


def mixture(x_TD: Tensor, w: Weights, ids_TK: Tensor) -> tuple[Tensor, Tensor]:
    """-> [T, D] of routed and shared experts, and the balance loss (section 2.1.2, equations 17 to 20)."""
    scores_TE, router = torch.sigmoid(x_TD @ w["moe.router.weight"].T), CONFIG.router
    chosen_TK = scores_TE.gather(1, ids_TK)
    weights_TK = chosen_TK / chosen_TK.sum(-1, keepdim=True) * router.route_scale
    y_TD = gated(x_TD, w["moe.shared.gate_up.weight"], w["moe.shared.down.weight"])
    for e in range(CONFIG.experts.num_experts):
        tokens, places = (ids_TK == e).nonzero(as_tuple=True)
        routed = gated(x_TD[tokens], w["moe.experts.gate_up.weight"][e], w["moe.experts.down.weight"][e])
        y_TD = y_TD.index_add(0, tokens, routed * weights_TK[tokens, places, None])
    counted_BE = torch.nn.functional.one_hot(ids_TK, scores_TE.shape[1]).view(SEQUENCES, -1, scores_TE.shape[1]).sum(1)
    f_BE = counted_BE * scores_TE.shape[1] / (router.topk * LENGTH)
    p_BE = (scores_TE / scores_TE.sum(-1, keepdim=True)).view(SEQUENCES, LENGTH, -1).mean(1)
    return y_TD, (f_BE * p_BE).sum()


def defined(layer: Layer, ids_TK: Tensor) -> Stepped:
    """What a step of the layer must give where its tokens go to these experts."""
    named = {name: p.detach().double().requires_grad_() for name, p in layer.model.named_parameters()}
    w = {name.removeprefix("blocks.0."): value for name, value in named.items()}
    x_TD = layer.x_TD.double().requires_grad_()
    h_TD = x_TD + attention(norm(x_TD, w["attn_norm.weight"]), w)
    y_TD, loss = mixture(norm(h_TD, w["mlp_norm.weight"]), w, ids_TK)
    output_TD = h_TD + y_TD
    ((output_TD * layer.dy_TD.double()).sum() + BALANCE_WEIGHT * loss).backward()
    loads_E = torch.bincount(ids_TK.flatten(), minlength=CONFIG.experts.num_experts)
    grads = {name: value.grad for name, value in named.items()}
    return Stepped(ids_TK, loads_E, loss.detach(), output_TD.detach(), x_TD.grad, grads)
