"""Cross entropy of one chunk of logits, and its gradient in their place.

    loss_c = log(sum_v exp(x_cv)) - x_c,label          FP32, zero where nothing is predicted
    x_cv <- weight_c * (exp(x_cv) / sum_v exp(x_cv) - [v = label])   in the dtype of the logits, zero likewise

A head of 129,280 tokens makes logits that are larger than anything else in a step. So the loss of a few thousand tokens
and its gradient come out of one pass over their logits, and `model.head_loss` walks a micro-batch chunk by chunk: the
idea of Liger-Kernel's fused linear cross entropy (arXiv 2410.10989). All arithmetic is FP32, with one rounding where a
gradient is stored. The weight is multiplied in before that rounding: a loss averaged over 63 million tokens has
gradients near 1e-8, which BF16 holds as well as it holds 1, since its exponents are those of FP32. One weight
serves all tokens, or each has its own: the gradient of any function of a label's log-probability is this one, with that
function's slope for a weight.

A device takes its exponentials from the hardware, to 2 units in the last place; bounds stand in the README.
"""

import torch
from torch import Tensor

from fp8moe.kernels import backend

IGNORE = -100  # the label of a token that predicts nothing
_DTYPES = (torch.bfloat16, torch.float32)
_LARGEST_VOCABULARY = 1 << 18


def cross_entropy(logits: Tensor, labels: Tensor, losses: Tensor) -> None:
    """Write losses [C] FP32, in nats, of logits [C, V] BF16 or FP32, contiguous, and labels int64 [C]; 0 where -100.

    A row with a NaN or an infinity has a loss that is not finite. Raises ValueError for other dtypes, shapes, layouts,
    V above 262,144, and (on a CPU, where it costs nothing) a label that V does not have; a GPU takes it for -100.
    """
    _check(logits, labels, losses)
    backend.op("cross_entropy")(logits, labels, losses)


def cross_entropy_with_gradient(logits: Tensor, labels: Tensor, weight: Tensor, losses: Tensor) -> None:
    """The same losses; logits are overwritten by the gradient of the sum of `weight` times each.

    weight: FP32 on the device of the logits, a scalar or [C]; `torch.full` makes one of a number without a wait.
    Raises ValueError as `cross_entropy` does, and for another weight.
    """
    _check(logits, labels, losses)
    shaped = weight.dim() == 0 or weight.shape == labels.shape
    if weight.dtype is not torch.float32 or not shaped or weight.device != logits.device:
        raise ValueError(
            f"weight must be an FP32 scalar, or FP32 [{len(labels)}], on {logits.device}, got {weight.dtype} "
            f"{list(weight.shape)} on {weight.device}: use torch.full((), number, device=logits.device)"
        )
    backend.op("cross_entropy_with_gradient")(logits, labels, weight, losses)


def _check(logits: Tensor, labels: Tensor, losses: Tensor) -> None:
    if logits.dim() != 2 or logits.dtype not in _DTYPES or not logits.is_contiguous():
        layout = "contiguous" if logits.is_contiguous() else "strided"
        raise ValueError(
            f"logits must be contiguous [C, V] in BF16 or FP32, got {layout} {list(logits.shape)} in {logits.dtype}: "
            "flatten or cast"
        )
    size = logits.shape[1]
    if not 1 <= size <= _LARGEST_VOCABULARY:
        raise ValueError(f"logits must have 1 to {_LARGEST_VOCABULARY} columns, got {size}: split the vocabulary")
    if labels.shape != logits.shape[:1] or labels.dtype is not torch.int64 or labels.device != logits.device:
        raise ValueError(
            f"labels must be int64 [{logits.shape[0]}] on {logits.device}, got {labels.dtype} {list(labels.shape)} on "
            f"{labels.device}: give one for each row"
        )
    if losses.shape != labels.shape or losses.dtype is not torch.float32 or losses.device != logits.device:
        raise ValueError(
            f"losses must be FP32 [{logits.shape[0]}] on {logits.device}, got {losses.dtype} {list(losses.shape)} on "
            f"{losses.device}: allocate them so"
        )
    if not _read_for_free(labels):
        return
    if bool(((labels >= size) | ((labels < 0) & (labels != IGNORE))).any()):
        raise ValueError(
            f"labels must be below V={size} or {IGNORE}, got {int(labels.min())} to {int(labels.max())}: "
            "use the vocabulary of the head"
        )


def _read_for_free(labels: Tensor) -> bool:
    return labels.device.type == "cpu" and type(labels) is Tensor and not torch.compiler.is_compiling()
