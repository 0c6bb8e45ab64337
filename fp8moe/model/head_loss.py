"""The head and its cross entropy in chunks of tokens: the logits of a micro-batch are never there as a whole.

    for each chunk of tokens c:
        logits   [C, V] = x_c @ W^T             the head's Fprop, in its own dtype
        losses_c [C]    in FP32, and logits <- their gradient        `kernels.cross_entropy`, one pass
        dx_c     [C, D] = logits @ W            Dgrad
        dW       [V, D] += logits^T @ x_c       Wgrad, into FP32 `main_grad`

What a chunk makes is let go before the next one. Beside `main_grad` the peak is CHUNK_BYTES of logits, dx [T, D] and
dx_c: 0.79 GB for 16,384 tokens of a vocabulary of 129,280 and a width of 7,168 in BF16 (2,048 tokens a chunk), where
whole logits, their FP32 copies and gradients take 34 GB, 16 bytes a logit. Chunks are as large as that because Wgrad
passes over all of `main_grad` for each. The number of launches depends on the number of chunks alone.

The loss's weight in the total is a count of tokens, known before the forward. So training takes value and gradients in
one walk, in its forward: the gradient of each logit is multiplied by the weight in FP32 and rounded once, as under
autograd, and dW joins `main_grad` on the spot. To put dW off, as other weight gradients are for a zero-bubble schedule,
would keep the gradients of all logits until then. Ordinary autograd learns the weight only in its backward, and
`main_grad` cannot be scaled afterwards, so there the walk with gradients comes in the backward, a product more; in
evaluation there is none. Gradients for weight one, scaled later, were refused: dW would need [V, D] of its own.

A loss of its own, a `ChunkLoss`, is given the logits of a chunk and writes their gradient in their place. Most depend
on a token by the log-probability of its label alone: such a `TokenLoss` has the gradient of cross entropy with a weight
a token, minus the function's slope, so a chunk's losses come first, then the slopes, then the gradients. That is one
more pass over a chunk's logits and no more memory.

Every row of a chunk is computed as in one product of all tokens. dW is a sum of one FP32 product a chunk, so it may
differ from a single product by the association of its sums.

Legend: T tokens, C of a chunk, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from fp8moe.kernels.cross_entropy import cross_entropy, cross_entropy_with_gradient
from fp8moe.kernels.fp8 import ceil_div
from fp8moe.layers.linear import Linear
from fp8moe.layers.recompute import Recallable

CHUNK_BYTES = 512 << 20  # of a chunk's logits
_CPU_TOKENS = 1024  # of a chunk on a CPU: enough for its products, few enough to stay in its cache and in used memory
_ROWS = 128  # a chunk is a multiple of them, as the tiles of its products are


class ChunkLoss(Protocol):
    """A loss of the main model's tokens in place of cross entropy, by their logits.

    temperature: the logits are divided by it first.
    """

    temperature: float

    def of_logits(
        self,
        microbatch: int,
        tokens: slice,
        logits_CV: Tensor,
        labels_C: Tensor,
        weight: Tensor | None,
        losses_C: Tensor,
    ) -> None:
        """Write the losses [C] FP32; with a weight, an FP32 scalar, logits <- the gradient of their sum times it.

        tokens: places of the chunk in the flattened micro-batch. Where labels are -100 losses and gradients are 0.
        Nothing may wait for the device.
        """
        ...


class TokenLoss(ChunkLoss, Protocol):
    """A loss that depends on a token by the log-probability of its label alone; cross entropy is minus that."""

    def __call__(self, microbatch: int, tokens: slice, logp_C: Tensor) -> tuple[Tensor, Tensor]:
        """Losses [C] FP32, each a function of one token's log-probability, and their derivatives by it.

        logp_C: FP32, of the labels of `tokens`, places in the flattened micro-batch; 0 where nothing is predicted,
        where both results must be finite and the loss 0. Nothing may wait for the device.
        """
        ...

    def of_logits(
        self,
        microbatch: int,
        tokens: slice,
        logits_CV: Tensor,
        labels_C: Tensor,
        weight: Tensor | None,
        losses_C: Tensor,
    ) -> None:
        """Cross entropy's gradient with the slopes for weights."""
        of_labels(partial(self, microbatch), tokens, logits_CV, labels_C, weight, losses_C)


# The same of one micro-batch: of a chunk's logits, labels, weight and losses; of labels' log-probabilities.
ChunkLossHere = Callable[[slice, Tensor, Tensor, Tensor | None, Tensor], None]
TokenLossHere = Callable[[slice, Tensor], tuple[Tensor, Tensor]]


def chunk_tokens(tokens: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Tokens of a chunk: as many as CHUNK_BYTES allow, then evened out over the chunks; at least 128.

    On a CPU the bytes are those of the logits' FP32 copy as well, which its weight gradient multiplies, and 1,024
    tokens are the most.
    """
    on_cpu = device.type == "cpu"
    copied = 4 if on_cpu and dtype is not torch.float32 else 0
    most = max(CHUNK_BYTES // (vocab_size * (dtype.itemsize + copied)) // _ROWS, 1) * _ROWS
    if on_cpu:
        most = min(most, _CPU_TOKENS)
    num_chunks = max(ceil_div(tokens, most), 1)
    return max(ceil_div(ceil_div(tokens, num_chunks), _ROWS), 1) * _ROWS


def of_cross_entropy(
    tokens: slice, logits_CV: Tensor, labels_C: Tensor, weight: Tensor | None, losses_C: Tensor
) -> None:
    """Cross entropy as a `ChunkLossHere`: nats of the labels."""
    if weight is None:
        cross_entropy(logits_CV, labels_C, losses_C)
    else:
        cross_entropy_with_gradient(logits_CV, labels_C, weight, losses_C)


def of_labels(
    token_loss: TokenLossHere,
    tokens: slice,
    logits_CV: Tensor,
    labels_C: Tensor,
    weight: Tensor | None,
    losses_C: Tensor,
) -> None:
    """A function of the labels' log-probabilities as a `ChunkLossHere`."""
    cross_entropy(logits_CV, labels_C, losses_C)
    losses, slopes_C = token_loss(tokens, -losses_C)
    if weight is not None:
        cross_entropy_with_gradient(logits_CV, labels_C, weight * -slopes_C, losses_C)
    losses_C.copy_(losses)


@torch.no_grad()
def head_loss(
    head: Linear, x_TD: Tensor, labels_T: Tensor, weight: Tensor | None, loss: ChunkLossHere = of_cross_entropy
) -> tuple[Tensor, Tensor | None]:
    """The loss summed over the labels that are not -100 (an FP32 scalar), and the gradient of x times `weight`.

    weight: an FP32 scalar on the device, which multiplies what `main_grad` gets too; without one there is no gradient.
    loss: of each chunk, in nats.
    """
    losses_T = torch.empty(len(x_TD), dtype=torch.float32, device=x_TD.device)
    dx_TD = None if weight is None else torch.empty_like(x_TD)
    size = chunk_tokens(len(x_TD), head.weight.shape[0], x_TD.dtype, x_TD.device)
    chunks = zip(*(part.split(size) for part in (x_TD, labels_T, losses_T)), strict=True)
    for number, (x_CD, labels_C, losses_C) in enumerate(chunks):
        dx_CD = None if dx_TD is None else dx_TD.narrow(0, number * size, len(x_CD))
        here = partial(loss, slice(number * size, number * size + len(x_CD)))
        _walk_chunk(head, x_CD, labels_C, weight, losses_C, dx_CD, here)
    return losses_T.sum(dtype=torch.float64).float(), dx_TD


def _walk_chunk(
    head: Linear,
    x_CD: Tensor,
    labels_C: Tensor,
    weight: Tensor | None,
    losses_C: Tensor,
    dx_CD: Tensor | None,
    loss: Callable[[Tensor, Tensor, Tensor | None, Tensor], None],
) -> None:
    """Write losses and dx of one chunk and add its dW; a function, so that its logits end with it."""
    logits_CV = head.fprop(x_CD)
    loss(logits_CV, labels_C, weight, losses_C)
    if dx_CD is None:
        return
    dx_CD.copy_(head.dgrad(logits_CV))
    head.wgrad(logits_CV, x_CD)


def head_loss_sum(head: Linear, x: Recallable, labels_T: Tensor) -> Tensor:
    """The same nats under ordinary autograd, whatever weight its backward brings."""
    return _HeadLossFunction.apply(x.tensor, head.weight, x, labels_T, head)


class _HeadLossFunction(torch.autograd.Function):
    """The weight is an argument only so that autograd enters when the input needs no gradient."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight: Tensor, x: Recallable, labels_T: Tensor, head: Linear) -> Tensor:
        ctx.recall, ctx.labels_T, ctx.head = x.recall, labels_T, head
        return head_loss(head, x_TD, labels_T, None)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        _, dx_TD = head_loss(ctx.head, ctx.recall(), ctx.labels_T, grads[0])
        return dx_TD, None, None, None, None
