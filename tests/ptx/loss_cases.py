"""Cross entropy and the embedding's weight gradient on the machine.

Losses and gradients are held to their bounds around FP64, ignored rows to zero; the embedding's sums to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from tests.kernels.loss_rows import STORAGE, assert_within_bounds, logits_and_labels
from tests.ptx.launching import Machine, on_machine
from tests.ptx.moving_cases import DTYPES, Case, ops

WEIGHT = 1e-8


def cross_entropy(machine: Machine, dtype: torch.dtype, gradient: bool) -> None:
    # The compile table's kernel counts on a V that is a multiple of 16.
    for rows, size in ((2, 8192),) if machine.count else ((5, 4112), (4, 8208)):
        logits, labels = logits_and_labels(rows, size, dtype=dtype)
        result, losses, weight = logits.clone(), torch.empty(rows), torch.tensor(WEIGHT)
        loss = ops("triton", "cross_entropy")
        with on_machine(machine):
            if gradient:
                loss.cross_entropy_with_gradient(result, labels, weight, losses)
            else:
                loss.cross_entropy(result, labels, losses)
        assert gradient or torch.equal(result, logits), "the logits were changed"
        if not gradient:
            ops("reference", "cross_entropy").cross_entropy_with_gradient(result, labels, weight, torch.empty(rows))
        assert_within_bounds(losses, result, logits, labels, WEIGHT, storage=STORAGE[dtype])
    if gradient and not machine.count:
        weight_a_token(machine, dtype)


def weight_a_token(machine: Machine, dtype: torch.dtype) -> None:
    logits, labels = logits_and_labels(5, 4112, dtype=dtype)
    weights = torch.tensor([WEIGHT, -1.0, 0.0, 3.0, -WEIGHT])
    result, losses, alone = logits.clone(), torch.empty(5), torch.empty(5)
    with on_machine(machine):
        ops("triton", "cross_entropy").cross_entropy_with_gradient(result, labels, weights, losses)
    for row, weight in enumerate(weights):
        expected = logits[row : row + 1].clone()
        with on_machine(machine):
            ops("triton", "cross_entropy").cross_entropy_with_gradient(
                expected, labels[row : row + 1], weight.clone(), alone[row : row + 1]
            )
        assert torch.equal(result[row], expected[0])
    assert torch.equal(losses, alone)


def embedding_wgrad(machine: Machine, dtype: torch.dtype) -> None:
    tokens, dim, vocabulary = (24, 2048, 40) if machine.count else (37, 1040, 9)
    dy, ids = torch.randn(tokens, dim).to(dtype), torch.randint(vocabulary, (tokens,))
    ids[5:25] = 3
    total = torch.randn(vocabulary, dim)
    expected = total.clone()
    ops("reference", "embedding").embedding_wgrad(dy, ids, expected)
    with on_machine(machine):
        ops("triton", "embedding").embedding_wgrad(dy, ids, total)
    assert torch.equal(total, expected)


def cases() -> Iterator[Case]:
    """Every kernel of the losses and of the embedding."""
    for dtype, kind in DTYPES:
        yield f"triton cross_entropy {kind}", partial(cross_entropy, dtype=dtype, gradient=False)
        yield f"triton cross_entropy_with_gradient {kind}", partial(cross_entropy, dtype=dtype, gradient=True)
        yield f"triton embedding_wgrad {kind}", partial(embedding_wgrad, dtype=dtype)
