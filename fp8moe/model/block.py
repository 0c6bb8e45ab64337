"""A transformer block, cut at its communications into four phases: attn, dispatch, mlp, combine.

    attn      norm, MLA, residual, norm, route, cast           compute
    dispatch  rows to the ranks of their experts               communication
    mlp       shared experts, grouped GEMMs, SwiGLU            compute
    combine   rows home, sum, residual                         communication

A dense block has no communication and is two phases, attn and mlp. `Block.forward` runs the parts in order under
ordinary autograd; `phases.py` runs the same parts as phases. Both give equal bits: sums are written in one order.

Legend: T tokens, D model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fp8moe.layers.attention import AttentionConfig, LatentAttention, Positions
from fp8moe.layers.dispatch import Dispatcher
from fp8moe.layers.mlp import Mlp
from fp8moe.layers.moe import MoE
from fp8moe.layers.norm import RMSNorm
from fp8moe.layers.precision import Precision
from fp8moe.layers.recompute import DEFAULT, Recallable, Recompute
from fp8moe.layers.router import RouterConfig
from fp8moe.model.config import ModelConfig


class Block(nn.Module):
    """x [T, D] -> x [T, D]; block number `layer` of the model, with a dense MLP or a mixture of experts."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        *,
        precision: Precision,
        dispatcher: Dispatcher,
        recompute: frozenset[Recompute] = DEFAULT,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        c = config
        self.attn_norm = RMSNorm(c.dim, eps=c.norm_eps, precision=precision, recompute=recompute, device=device)
        self.attn = LatentAttention(attention_config(c), precision=precision, recompute=recompute, device=device)
        self.mlp_norm = RMSNorm(c.dim, eps=c.norm_eps, precision=precision, recompute=recompute, device=device)
        self.mlp: Mlp | None = None
        self.moe: MoE | None = None
        if c.is_dense(layer):
            self.mlp = Mlp(c.dim, c.dense_hidden, precision=precision, recompute=recompute, device=device)
        else:
            self.moe = MoE(
                c.dim,
                c.expert_hidden,
                router_config(c),
                num_shared_experts=c.num_shared_experts,
                dispatcher=dispatcher,
                precision=precision,
                recompute=recompute,
                device=device,
            )

    def attend(self, x_TD: Tensor, positions: Positions) -> tuple[Tensor, Recallable]:
        """The residual stream after attention, h [T, D], and its norm for the MLP."""
        h_TD = x_TD + self.attn(self.attn_norm(x_TD), positions)
        return h_TD, self.mlp_norm(h_TD)

    def forward(self, x_TD: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """-> the block's output and its sequence-wise balance loss (a scalar, zero for a dense block)."""
        h_TD, normed_TD = self.attend(x_TD, positions)
        if self.moe is None:
            assert self.mlp is not None
            return h_TD + self.mlp(normed_TD), h_TD.new_zeros((), dtype=torch.float32)
        y_TD, routing = self.moe(normed_TD, positions.num_sequences)
        return h_TD + y_TD, routing.balance_loss


def attention_config(c: ModelConfig) -> AttentionConfig:
    """What the attention layer needs of a model's configuration."""
    return AttentionConfig(
        dim=c.dim,
        num_heads=c.num_heads,
        q_lora_rank=c.q_lora_rank,
        kv_lora_rank=c.kv_lora_rank,
        nope_dim=c.nope_dim,
        rope_dim=c.rope_dim,
        v_dim=c.v_dim,
        softmax_scale=c.softmax_scale,
        norm_eps=c.norm_eps,
        kind=c.attention,
    )


def router_config(c: ModelConfig) -> RouterConfig:
    """What the router needs of a model's configuration."""
    return RouterConfig(
        num_experts=c.num_experts,
        topk=c.topk,
        num_groups=c.num_groups,
        top_groups=c.top_groups,
        score=c.score,
        normalize_topk=c.normalize_topk,
        route_scale=c.route_scale,
        force_balance=c.force_balance,
    )
