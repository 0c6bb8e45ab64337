"""Cross entropy and its gradient by PyTorch's log-softmax in FP32: bit for bit what its autograd computes.

Rows go in blocks, so that their FP32 copies stay in the cache: on a CPU that is faster than whole passes, and what is
allocated beside the logits does not grow with them.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fp8moe.kernels.fp8 import ceil_div

_BLOCK = 1 << 19  # values, about


def cross_entropy(logits: Tensor, labels: Tensor, losses: Tensor) -> None:
    for _ in _blocks(logits, labels, losses):
        pass


def cross_entropy_with_gradient(logits: Tensor, labels: Tensor, weight: Tensor, losses: Tensor) -> None:
    start = 0
    for rows, log_softmax, predicted, column in _blocks(logits, labels, losses):
        weights = weight if weight.dim() == 0 else weight[start : start + len(rows)]
        start += len(rows)
        d_losses = torch.zeros_like(log_softmax).scatter_(1, column, (predicted * -weights)[:, None])
        rows.copy_(torch.ops.aten._log_softmax_backward_data(d_losses, log_softmax, 1, torch.float32))
        rows.masked_fill_(~predicted[:, None], 0)  # where it was infinite or NaN too


def _blocks(logits: Tensor, labels: Tensor, losses: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Write the losses of each block of rows -> (rows, their log-softmax, whether they predict, the label's column).

    The column, [rows, 1], is any where nothing is predicted.
    """
    size = ceil_div(_BLOCK, logits.shape[1])
    for start in range(0, len(labels), size):
        rows, chosen = logits[start : start + size], labels[start : start + size]
        predicted = (chosen >= 0) & (chosen < logits.shape[1])
        column = chosen.masked_fill(~predicted, 0)[:, None]
        log_softmax = rows.float().log_softmax(-1)
        losses[start : start + size] = -log_softmax.gather(1, column)[:, 0].masked_fill(~predicted, 0)
        yield rows, log_softmax, predicted, column
