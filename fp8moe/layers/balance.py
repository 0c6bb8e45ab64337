"""The sequence-wise balance loss where `kernels.route` does not make it (DeepSeek-V3 report, 2.1.2).

Of a sequence it is the sum over experts of f, the expert's share of the choices over the mean one, times p, the mean of
its shares of the tokens' scores. The op makes both of the logits and its own choice; p is wanted apart where ranks
share sequences or experts are given (`given_experts`).

Legend: T tokens, E experts, B sequences.
"""

from __future__ import annotations

from torch import Tensor

from fp8moe.layers.attention.context import ContextExchange

TINY = 1e-20  # as `kernels.route` keeps a sum of scores from being zero


def scores(logits_TE: Tensor, score: str) -> Tensor:
    """[T, E]: those of the balance loss, which but for softmax_topk weigh the experts as well."""
    return logits_TE.sigmoid() if score == "sigmoid" else logits_TE.softmax(-1)


def mean_shares(logits_TE: Tensor, score: str, num_sequences: int) -> Tensor:
    """p [B, E]: the mean over a sequence's tokens of each expert's share of the token's scores."""
    scores_TE = scores(logits_TE, score)
    shares_TE = scores_TE / (scores_TE.sum(-1, keepdim=True) + TINY)
    return shares_TE.unflatten(0, (num_sequences, -1)).mean(1)


class BalanceShare:
    """This rank's share of the balance loss of whole sequences: f of the other ranks' tokens is on its way.

    f [B, E] and p [B, E] are those of this rank's tokens.
    """

    def __init__(self, f_BE: Tensor, p_BE: Tensor, exchange: ContextExchange) -> None:
        self._p_BE = p_BE
        self._message = exchange.total(f_BE / exchange.size**2)  # the mean over ranks, of which a rank has one part

    def f_BE(self) -> Tensor:
        """What `route_backward` multiplies this rank's scores by; waits."""
        return self._message.wait()

    def value(self) -> Tensor:
        """FP32 scalar, unweighted; waits."""
        return (self._message.wait() * self._p_BE).sum()
