"""Router: which experts a token goes to, with what weight, and how their load is balanced (DeepSeek-V3 report, 2.1.2).

Scores are FP32. The choice is made on scores plus a bias that steers load, the weights come from the scores alone,
normalised over the chosen and scaled. Groups limit how many nodes a token visits. The product is FP32; its operands are
widened again in backward, since FP32 copies of x, which is kept or recomputed anyway, would weigh more than x.

Load is balanced by the bias, moved after each step: an expert above the mean load loses gamma of it, one below gains
it. Loads are counted in training forwards only, once, and summed over all ranks. A faint sequence-wise loss keeps a
single sequence from collapsing on few experts.

Legend: T tokens, D model, E experts, K top-k, B sequences, S tokens of a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fp8moe.kernels.topk import group_limited_topk
from fp8moe.layers.recipe import Recipe
from fp8moe.layers.recompute import Recallable, capture_saved, kept, recompute_saved


@dataclass(frozen=True)
class RouterConfig:
    """How experts are chosen for a token.

    score: sigmoid or softmax of the gate's logits. A token's `topk` experts come from the best `top_groups` of
    `num_groups` groups. normalize_topk: weights of the chosen sum to 1; then they are multiplied by route_scale.
    force_balance: experts in turn, the same number for all, for benchmarks. bias_gamma: step of the balancing bias.
    aux_loss_alpha: weight of the sequence-wise balance loss.
    """

    topk: int
    num_groups: int = 1
    top_groups: int = 1
    score: Literal["sigmoid", "softmax"] = "sigmoid"
    normalize_topk: bool = True
    route_scale: float = 1.0
    force_balance: bool = False
    aux_loss_alpha: float = 1e-4
    bias_gamma: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("topk", "num_groups", "top_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.router.{name}={getattr(self, name)} must be at least 1")
        if self.score not in ("sigmoid", "softmax"):
            raise ValueError(f"model.router.score={self.score!r} is not a score function: use sigmoid or softmax")
        if self.top_groups > self.num_groups:
            raise ValueError(
                f"model.router.top_groups={self.top_groups} exceeds num_groups={self.num_groups}: "
                f"use at most {self.num_groups}"
            )

    def check(self, num_experts: int) -> None:
        """Raise ValueError unless `num_experts` experts can be routed to so."""
        if num_experts % self.num_groups:
            legal = max(g for g in range(1, self.num_groups + 1) if num_experts % g == 0)
            raise ValueError(
                f"model.router.num_groups={self.num_groups} does not divide num_experts={num_experts}: use {legal}"
            )
        reachable = num_experts // self.num_groups * self.top_groups
        if self.topk > reachable:
            raise ValueError(
                f"model.router.topk={self.topk} exceeds the {reachable} experts of "
                f"top_groups={self.top_groups} groups: use at most {reachable}"
            )


@dataclass(frozen=True)
class Routing:
    """Choice and weights of each token; `balance_loss` is the sequence-wise loss summed over sequences, unweighted."""

    topk_ids_TK: Tensor
    topk_weights_TK: Tensor
    balance_loss: Tensor


class Router(nn.Module):
    """`weight` [E, D]; buffers `bias_E` (FP32) and `counts_E` (int64 loads since the last bias update)."""

    bias_E: Tensor
    counts_E: Tensor

    def __init__(self, dim: int, num_experts: int, config: RouterConfig, recipe: Recipe) -> None:
        super().__init__()
        self.config, self.num_experts = config, num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, dim, dtype=recipe.dtype))
        self.register_buffer("bias_E", torch.zeros(num_experts, dtype=torch.float32))
        self.register_buffer("counts_E", torch.zeros(num_experts, dtype=torch.int64))

    def forward(self, x_TD: Tensor | Recallable, num_sequences: int) -> Routing:
        """x [T, D], T = num_sequences x S, sequence after sequence -> the routing of every token."""
        c = self.config
        logits_TE = self._logits(kept(x_TD))
        scores_TE = logits_TE.sigmoid() if c.score == "sigmoid" else logits_TE.softmax(-1)
        topk_ids_TK = self.choose(scores_TE.detach())
        weights_TK = scores_TE.gather(1, topk_ids_TK)
        if c.normalize_topk:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        if self.training and torch.is_grad_enabled():
            self.counts_E += torch.bincount(topk_ids_TK.flatten(), minlength=self.num_experts)
        loss = sequence_loss(scores_TE, topk_ids_TK, num_sequences)
        return Routing(topk_ids_TK, weights_TK * c.route_scale, loss)

    def _logits(self, x_TD: Recallable) -> Tensor:
        recall, weight_ED = x_TD.recall, self.weight.detach()
        wide = x_TD.tensor.float(), self.weight.float()
        with capture_saved() as captured:
            logits_TE = nn.functional.linear(*wide)
        recompute_saved(captured, wide, lambda: (recall().float(), weight_ED.float()))
        return logits_TE

    def choose(self, scores_TE: Tensor) -> Tensor:
        """Top-k ids [T, K] int64 of biased scores, or in turn, the same number for all, when balance is forced."""
        c = self.config
        if c.force_balance:
            slots = torch.arange(scores_TE.shape[0] * c.topk, device=scores_TE.device)
            return (slots % self.num_experts).view(-1, c.topk)
        return group_limited_topk(scores_TE, self.bias_E, topk=c.topk, num_groups=c.num_groups, top_groups=c.top_groups)


def sequence_loss(scores_TE: Tensor, topk_ids_TK: Tensor, num_sequences: int) -> Tensor:
    """Sum over sequences of sum_e f_e P_e, a scalar FP32 that carries gradient through the scores.

    f_e is the share of a sequence's choices that fell on expert e, times E (1 when balanced); P_e the mean over its
    tokens of the score of e, normalised over experts. A balanced sequence gives 1. Weight it with alpha outside.
    """
    num_tokens, num_experts = scores_TE.shape
    if num_tokens == 0:
        return scores_TE.sum()
    shares_TE = scores_TE / (scores_TE.sum(-1, keepdim=True) + 1e-20)
    p_BE = shares_TE.view(num_sequences, -1, num_experts).mean(1)
    chosen = torch.zeros_like(scores_TE, requires_grad=False).scatter_(1, topk_ids_TK, 1.0)
    f_BE = chosen.view(num_sequences, -1, num_experts).mean(1) * (num_experts / topk_ids_TK.shape[1])
    return (f_BE * p_BE).sum()


@torch.no_grad()
def update_bias(model: nn.Module, gamma: float) -> None:
    """Move every router's bias by gamma towards balance and forget the counts. Counts must be reduced over ranks."""
    for module in model.modules():
        counts, bias = getattr(module, "counts_E", None), getattr(module, "bias_E", None)
        if counts is not None and bias is not None:
            load = counts.float()
            bias += gamma * torch.sign(load.mean() - load)
            counts.zero_()


def max_violation(counts_E: Tensor) -> float:
    """MaxVio: by how much the busiest expert exceeds the mean load, relative to it; 0 when balanced or without load."""
    load = counts_E.float()
    mean = load.mean()
    return float(load.max() / mean - 1) if mean > 0 else 0.0
