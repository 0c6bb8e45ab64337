"""One update of Muon for the matrices of a flat buffer (Jordan et al., 2024, kellerjordan.github.io/posts/muon).

Momentum [n, k] is replaced by a matrix with the same singular vectors whose singular values are near 1: five steps of a
quintic Newton-Schulz iteration in BF16, with `torch.optim.Muon`'s coefficients. Operations, their order and their
dtypes are that optimizer's. BF16 momentum is rounded when it is stored; the update uses it before. Two things torch's
lacks: masters are FP32 beside BF16 weights, and on a GPU matrices of equal shape are multiplied together, each
normalised by itself: a small expert's product has fewer tiles than the GPU has SMs. `torch.vmap` of torch's own
iteration was refused: it rounds each product to BF16 before it adds, and its results differ by a percent.

On a CPU each matrix is multiplied alone: with FP32 momentum it gets torch's bits, and the same ones whatever lies
beside it in a shard. In a batch a product of 16 x 16 x 16 sums in another order there. On a GPU the library chooses its
kernel by the size of the batch, and that may do the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from fp8moe.layers.linear import Matrix, multiplies_bf16
from fp8moe.train.optimizer.config import Adjust

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPS = 1e-7  # least norm that a matrix is divided by
BATCH_VALUES = 1 << 24  # that a GPU multiplies together at most, unless one matrix has more


def muon_step(
    master: Tensor,
    grad: Tensor,
    momentum: Tensor,
    weight: Tensor | None,
    matrices: Iterable[Matrix],
    *,
    lr: float,
    momentum_beta: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    weight_decay: float = 0.1,
    adjust: Adjust = "match_rms_adamw",
    grad_scale: Tensor | None = None,
) -> None:
    """Update `matrices` of master and momentum in place, and round master into weight; other values are left alone.

    All are contiguous [n]: master and grad FP32, momentum BF16 or FP32, weight BF16 where there is one; grad is only
    read. Decay is decoupled and before the update. grad_scale: FP32 [] on the same device, multiplied into the
    gradient; None for one. Temporary memory: at most 14 bytes for each of `batch_values`, or of the largest matrix
    (24 where operands are widened). Raises ValueError for other dtypes or layouts, and for a matrix beyond the end.
    """
    matrices = list(matrices)
    _check(master, grad, momentum, weight, matrices)
    for batch in _batches(matrices, batch_values(master.device)):
        _, _, n, k = batch[0]
        spans = list(_spans(batch))
        directions = torch.empty(len(batch), n, k, dtype=torch.bfloat16, device=master.device)
        for of_batch, values in spans:
            gradient = grad[values] if grad_scale is None else grad[values] * grad_scale
            average = _moved(momentum[values], gradient, momentum_beta, nesterov=nesterov)
            directions[of_batch] = average.view(-1, n, k)
            del gradient, average  # their memory is the iteration's
        directions = newton_schulz(directions, ns_steps)
        for of_batch, values in spans:
            updated = master[values].view(-1, n, k)
            updated.mul_(1 - lr * weight_decay).add_(directions[of_batch], alpha=-lr * size_factor(n, k, adjust))
            if weight is not None:
                weight[values].view(-1, n, k).copy_(updated)


def _moved(momentum: Tensor, gradient: Tensor, beta: float, *, nesterov: bool) -> Tensor:
    """Move momentum towards the gradient, in place -> what is orthogonalized, FP32; with FP32 momentum maybe itself."""
    average = momentum.float()
    average.lerp_(gradient, 1 - beta)
    if average is not momentum:
        momentum.copy_(average)
    return gradient.lerp(average, beta) if nesterov else average


def newton_schulz(x: Tensor, steps: int) -> Tensor:
    """x [b, n, k] -> BF16 [b, n, k]: of each matrix the singular vectors, with singular values of about 0.7 to 1.2."""
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.to(torch.bfloat16)
    if is_tall:  # the product of the shorter sides is the smaller one
        x = x.mT
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=EPS)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = _sum_and_product(None, x, x.mT)
        x = _sum_and_product(x, _sum_and_product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def size_factor(n: int, k: int, adjust: Adjust) -> float:
    """What an update of a matrix [n, k] is multiplied by, beside the learning rate.

    match_rms_adamw: 0.2 sqrt(max(n, k)), with which its values are about as large as AdamW's, so that both share a
    learning rate and a decay (Moonlight, arXiv 2502.16982, section 2.2). original: sqrt(max(1, n / k)).
    """
    return 0.2 * math.sqrt(max(n, k)) if adjust == "match_rms_adamw" else math.sqrt(max(1, n / k))


def _sum_and_product(
    summand: Tensor | None, left: Tensor, right: Tensor, *, beta: float = 1.0, alpha: float = 1.0
) -> Tensor:
    """beta summand + alpha left @ right, BF16 with FP32 sums, rounded once, on any device."""
    wide = torch.bfloat16 if multiplies_bf16(left.device) else torch.float32
    left, right = left.to(wide), right.to(wide)
    if summand is None:
        return (left @ right).to(torch.bfloat16)
    return torch.baddbmm(summand.to(wide), left, right, beta=beta, alpha=alpha).to(torch.bfloat16)


def batch_values(device: torch.device) -> int:
    """Values that are multiplied together at most, unless one matrix has more."""
    return 1 if device.type == "cpu" else BATCH_VALUES


def _batches(matrices: Sequence[Matrix], most: int) -> Iterator[list[Matrix]]:
    """Matrices of one shape, in their order, at most so many values together."""
    by_shape: dict[tuple[int, int], list[Matrix]] = {}
    for matrix in matrices:
        by_shape.setdefault((matrix.n, matrix.k), []).append(matrix)
    for (n, k), same in by_shape.items():
        count = max(1, most // (n * k))
        for first in range(0, len(same), count):
            yield same[first : first + count]


def _spans(batch: Sequence[Matrix]) -> Iterator[tuple[slice, slice]]:
    """(place in the batch, values) of matrices that lie side by side: the fewest slices that hold them all."""
    first = 0
    for i, matrix in enumerate(batch, start=1):
        if i == len(batch) or batch[i].start != matrix.stop:
            yield slice(first, i), slice(batch[first].start, matrix.stop)
            first = i


def _check(master: Tensor, grad: Tensor, momentum: Tensor, weight: Tensor | None, matrices: Sequence[Matrix]) -> None:
    if master.dtype is not torch.float32 or grad.dtype is not torch.float32:
        raise ValueError(f"master and gradient must be FP32, got {master.dtype} and {grad.dtype}: keep FP32 masters")
    if momentum.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"momentum must be BF16 or FP32, got {momentum.dtype}: cast it")
    if weight is not None and weight.dtype is not torch.bfloat16:
        raise ValueError(f"weight must be BF16, got {weight.dtype}: an FP32 weight is its own master, use weight=None")
    tensors = [master, grad, momentum, *([] if weight is None else [weight])]
    if any(t.shape != master.shape or t.dim() != 1 or not t.is_contiguous() for t in tensors):
        shapes = [list(t.shape) for t in tensors]
        raise ValueError(f"master, gradient, momentum and weight must be contiguous [n], got {shapes}: flatten them")
    for start, stop, n, k in matrices:
        if not 0 <= start <= stop <= len(master) or stop - start != n * k:
            raise ValueError(
                f"a matrix [{n}, {k}] has {n * k} values and must lie within the {len(master)} of the buffer, got "
                f"[{start}, {stop}): count from the buffer's first value"
            )
