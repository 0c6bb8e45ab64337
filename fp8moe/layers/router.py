"""Which experts a token goes to, and with what weight (DeepSeek-V3 report, sections 2.1.2 and 2.1.3).

Scores are FP32. The choice is made on scores plus a bias that steers load, the weights come from the scores alone,
normalised over the chosen and scaled. Groups limit how many nodes a token visits. Loads are counted in training
forwards only, once, and used by `balance.update_bias` after the step. The product is FP32; its operands are widened
again in backward, since FP32 copies of x, which is kept or recomputed anyway, would weigh more than x.

Legend: T tokens, D model, E experts, K top-k, B sequences, S tokens of a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fp8moe.kernels.topk import group_limited_topk
from fp8moe.layers.balance import sequence_loss
from fp8moe.layers.precision import Precision
from fp8moe.layers.recompute import Recallable, kept
from fp8moe.layers.saved import boxed, compute_again


@dataclass(frozen=True)
class RouterConfig:
    """`score` sigmoid or softmax; a token's experts come from `top_groups` of `num_groups` groups."""

    num_experts: int
    topk: int
    num_groups: int
    top_groups: int
    score: str
    normalize_topk: bool
    route_scale: float
    force_balance: bool


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

    def __init__(
        self, dim: int, config: RouterConfig, *, precision: Precision, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, dim, dtype=precision.dtype, device=device))
        self.register_buffer("bias_E", torch.zeros(config.num_experts, dtype=torch.float32, device=device))
        self.register_buffer("counts_E", torch.zeros(config.num_experts, dtype=torch.int64, device=device))

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
            self.counts_E += torch.bincount(topk_ids_TK.flatten(), minlength=c.num_experts)
        loss = sequence_loss(scores_TE, topk_ids_TK, num_sequences)
        return Routing(topk_ids_TK, weights_TK * c.route_scale, loss)

    def _logits(self, x_TD: Recallable) -> Tensor:
        recall, weight_ED = x_TD.recall, self.weight.detach()
        wide = x_TD.tensor.float(), self.weight.float()
        with boxed() as boxes:
            logits_TE = nn.functional.linear(*wide)
        compute_again(boxes, wide, lambda: (recall().float(), weight_ED.float()))
        return logits_TE

    def choose(self, scores_TE: Tensor) -> Tensor:
        """Top-k ids [T, K] int64 of biased scores, or in turn, the same number for all, when balance is forced."""
        c = self.config
        if c.force_balance:
            slots = torch.arange(scores_TE.shape[0] * c.topk, device=scores_TE.device)
            return (slots % c.num_experts).view(-1, c.topk)
        return group_limited_topk(scores_TE, self.bias_E, topk=c.topk, num_groups=c.num_groups, top_groups=c.top_groups)
