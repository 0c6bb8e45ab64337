"""Routing: from the gate's logits to each token's experts, their weights, loads and the balance loss, and back.

DeepSeek-V3 report, sections 2.1.2 and 2.1.3. Scores are the sigmoid of the logits, their softmax over all experts, or
the logits themselves, whose softmax is then taken over the chosen (`softmax_topk`). A bias that steers load is added
for the choice alone; weights come from the unbiased scores.

Experts lie in groups of equal size (the experts of one node). A token may use `top_groups` of them: a group counts by
the sum of its two largest biased scores or, as in DeepSeek-V2, by the largest; experts of the other groups are masked
with -inf, not with zero, because a biased score can be negative. Ties go to the lowest index, of groups and of experts,
on every back end: two layouts of one model route alike.

The balance loss is the report's, summed over sequences: sum over experts of f_e P_e, where f_e is the share of a
sequence's choices that fell on expert e, times E (1 when balanced), and P_e the mean over its tokens of the score of e
over the sum of the token's scores; for both softmaxes that is the softmax over all experts. f carries no gradient.

One op makes all of it in one pass over the logits, and the backward makes the scores again from them: what is kept for
it is the logits, the ids and f. The choice as an op of its own was refused: the scores then go through memory, and
gathering, normalising, counting and the loss around it are some twenty launches on a few numbers a token each.

Legend: T tokens, E experts, K top-k, B sequences.
"""

import torch
from torch import Tensor

from fp8moe.kernels import backend

SCORES = ("sigmoid", "softmax", "softmax_topk")
GROUP_SCORES = ("top2_sum", "max")


def route(
    logits_TE: Tensor,
    bias_E: Tensor,
    counts_E: Tensor | None,
    *,
    topk: int,
    num_groups: int,
    top_groups: int,
    score: str,
    group_score: str,
    normalize: bool,
    route_scale: float,
    num_sequences: int,
    force_balance: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits [T, E] FP32, T = num_sequences x S, and bias [E] FP32 -> (ids, weights, balance loss, f).

    ids: int64 [T, topk], by biased score, largest first; with force_balance the experts in turn, whatever the scores.
    weights: FP32 [T, topk]; normalize: they sum to 1, as those of softmax_topk always do; then times route_scale.
    balance loss: FP32 scalar, summed over sequences, unweighted. f: FP32 [B, E], for `route_backward`.
    counts: int64 [E], the tokens of each expert are added; None counts none. Nothing waits for the device.

    Raises ValueError for other dtypes, and for sizes that do not fit together.
    """
    num_tokens, num_experts = _check_logits(logits_TE, bias_E, counts_E)
    _check_choice(num_experts, topk, num_groups, top_groups)
    _check_name("score", score, SCORES)
    _check_name("group_score", group_score, GROUP_SCORES)
    if num_sequences < 1 or num_tokens % num_sequences:
        nearest = max(b for b in range(1, max(num_sequences, 1) + 1) if num_tokens % b == 0)
        raise ValueError(f"num_sequences={num_sequences} does not divide the {num_tokens} tokens: use {nearest}")
    results: tuple[Tensor, Tensor, Tensor, Tensor] = backend.op("route")(
        logits_TE, bias_E, counts_E, topk=topk, num_groups=num_groups, top_groups=top_groups, score=score,
        group_score=group_score, normalize=normalize, route_scale=route_scale, num_sequences=num_sequences,
        force_balance=force_balance,
    )  # fmt: skip
    return results


def route_backward(
    logits_TE: Tensor,
    topk_ids_TK: Tensor,
    f_BE: Tensor,
    d_weights_TK: Tensor,
    d_loss: Tensor,
    *,
    score: str,
    normalize: bool,
    route_scale: float,
) -> Tensor:
    """What `route` had and gave, and the gradients of weights [T, K] and balance loss [], FP32 -> d logits [T, E] FP32.

    Raises ValueError for other shapes or dtypes.
    """
    _check_name("score", score, SCORES)
    num_tokens, num_experts = logits_TE.shape if logits_TE.dim() == 2 else (-1, -1)
    num_sequences = f_BE.shape[0] if f_BE.dim() == 2 else 0
    expected = (num_tokens, topk_ids_TK.shape[-1])
    if topk_ids_TK.shape != expected or d_weights_TK.shape != expected or d_loss.dim() != 0:
        raise ValueError(
            f"route_backward takes logits [T, E], ids and d_weights [T, K] and d_loss [], got {list(logits_TE.shape)}, "
            f"{list(topk_ids_TK.shape)}, {list(d_weights_TK.shape)} and {list(d_loss.shape)}: pass what route gave"
        )
    if num_sequences < 1 or num_tokens % num_sequences or f_BE.shape[1] != num_experts:
        raise ValueError(
            f"f must be [B, {num_experts}] with B a divisor of the {num_tokens} tokens, got {list(f_BE.shape)}: "
            "pass the f that route gave"
        )
    dtypes = [t.dtype for t in (logits_TE, f_BE, d_weights_TK, d_loss)]
    if set(dtypes) != {torch.float32} or topk_ids_TK.dtype is not torch.int64:
        raise ValueError(
            f"logits, f and both gradients must be FP32 and ids int64, got {', '.join(map(str, dtypes))} and "
            f"{topk_ids_TK.dtype}: cast them"
        )
    d_logits_TE: Tensor = backend.op("route_backward")(
        logits_TE, topk_ids_TK, f_BE, d_weights_TK, d_loss, score=score, normalize=normalize, route_scale=route_scale
    )
    return d_logits_TE


def _check_logits(logits_TE: Tensor, bias_E: Tensor, counts_E: Tensor | None) -> tuple[int, int]:
    num_experts = logits_TE.shape[-1]
    if logits_TE.dim() != 2 or bias_E.shape != (num_experts,):
        raise ValueError(
            f"logits must be [T, E] and the bias [E], got {list(logits_TE.shape)} and {list(bias_E.shape)}: reshape"
        )
    if logits_TE.dtype is not torch.float32 or bias_E.dtype is not torch.float32:
        raise ValueError(f"logits and bias must be FP32, got {logits_TE.dtype} and {bias_E.dtype}: cast both")
    if counts_E is not None and (counts_E.shape != (num_experts,) or counts_E.dtype is not torch.int64):
        raise ValueError(
            f"counts must be int64 [{num_experts}], got {counts_E.dtype} {list(counts_E.shape)}: "
            "one count an expert, or None"
        )
    return logits_TE.shape[0], num_experts


def _check_choice(num_experts: int, topk: int, num_groups: int, top_groups: int) -> None:
    if num_groups < 1 or num_experts % num_groups:
        legal = [n for n in range(1, num_experts + 1) if num_experts % n == 0]
        nearest = min(legal, key=lambda n: abs(n - num_groups))
        raise ValueError(f"num_groups={num_groups} does not divide num_experts={num_experts}: use {nearest}")
    if not 1 <= top_groups <= num_groups:
        nearest = min(max(top_groups, 1), num_groups)
        raise ValueError(f"top_groups={top_groups} must be between 1 and num_groups={num_groups}: use {nearest}")
    reachable = top_groups * (num_experts // num_groups)
    if not 1 <= topk <= reachable:
        nearest = min(max(topk, 1), reachable)
        raise ValueError(f"topk={topk} must be between 1 and the {reachable} experts of top_groups: use {nearest}")


def _check_name(name: str, value: str, legal: tuple[str, ...]) -> None:
    if value not in legal:
        raise ValueError(f"{name}={value!r} does not exist: use {' or '.join(legal)}")
