"""Multi-token prediction, depth 1 (DeepSeek-V3 report, section 2.2).

At position i the module sees the main model's last hidden state of i and the embedding of token i+1, each normed, joins
them by one projection, runs one more block, and predicts token i+2 through the shared head. Embedding and head are the
main model's own. The hidden state is taken before the main model's final norm, since the module norms it itself.

Legend: T tokens, D model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fp8moe.layers.attention import Positions
from fp8moe.layers.dispatch import Dispatcher
from fp8moe.layers.linear import Linear
from fp8moe.layers.norm import RMSNorm
from fp8moe.layers.precision import Precision
from fp8moe.layers.recompute import DEFAULT, Recallable, Recompute
from fp8moe.model.block import Block
from fp8moe.model.config import ModelConfig


class Mtp(nn.Module):
    """(hidden [T, D], embedding of the next token [T, D]) -> hidden for the shared head [T, D], balance loss."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        precision: Precision,
        dispatcher: Dispatcher,
        recompute: frozenset[Recompute] = DEFAULT,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()

        def norm() -> RMSNorm:
            return RMSNorm(config.dim, eps=config.norm_eps, precision=precision, recompute=recompute, device=device)

        self.hidden_norm, self.embedding_norm, self.final_norm = norm(), norm(), norm()
        self.join = Linear(2 * config.dim, config.dim, precision=precision, device=device)
        self.block = Block(
            config, config.num_layers, precision=precision, dispatcher=dispatcher, recompute=recompute, device=device
        )

    def forward(self, hidden_TD: Tensor, next_TD: Tensor, positions: Positions) -> tuple[Recallable, Tensor]:
        x_TD, balance_loss = self.block(self.enter(hidden_TD, next_TD), positions)
        return self.leave(x_TD), balance_loss

    def enter(self, hidden_TD: Tensor, next_TD: Tensor) -> Tensor:
        """What the block works on."""
        normed = self.hidden_norm(hidden_TD), self.embedding_norm(next_TD)
        recalls = [part.recall for part in normed]
        joined = torch.cat([part.tensor for part in normed], dim=-1)
        return self.join(Recallable(joined, lambda: torch.cat([recall() for recall in recalls], dim=-1)))

    def leave(self, x_TD: Tensor) -> Recallable:
        """The block's output, normed for the head."""
        return self.final_norm(x_TD)
