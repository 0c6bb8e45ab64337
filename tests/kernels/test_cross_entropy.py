"""Cross entropy by the specification: FP64 autograd of its definition, bit for bit torch's own, and what is refused."""

import pytest
import torch
from torch.nn import functional as F

from fp8moe.kernels import backend
from fp8moe.kernels.cross_entropy import IGNORE, cross_entropy, cross_entropy_with_gradient
from fp8moe.kernels.reference import cross_entropy as twin
from tests.kernels.loss_rows import STORAGE, assert_within_bounds, logits_and_labels

SIZES = [(1, 1), (7, 5), (24, 259), (3, 4096), (2, 50_001)]


@pytest.fixture(autouse=True)
def specification():
    backend.set_backend("reference")
    yield
    backend.set_backend(None)


def both(logits, labels, weight):
    """(losses, gradients) from one call; the losses alone are the same, and the logits stay as they are."""
    losses, alone = (torch.full(labels.shape, float("nan"), device=logits.device) for _ in range(2))
    before = logits.clone()
    cross_entropy(logits, labels, alone)
    assert torch.equal(logits, before)
    cross_entropy_with_gradient(logits, labels, torch.tensor(weight, device=logits.device), losses)
    assert torch.equal(losses, alone)
    return losses, logits


@pytest.mark.parametrize("weight", [1.0, 1e-8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "size"), SIZES)
def test_values_and_gradients_are_those_of_the_definition(rows, size, dtype, weight):
    logits, labels = logits_and_labels(rows, size, dtype=dtype)
    losses, gradients = both(logits.clone(), labels, weight)
    assert gradients.dtype is dtype
    assert_within_bounds(losses, gradients, logits, labels, weight, storage=STORAGE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "size"), SIZES)
def test_it_is_bit_for_bit_autograd_of_cross_entropy(rows, size, dtype, monkeypatch):
    monkeypatch.setattr(twin, "_BLOCK", 2 * size)  # several blocks, the last of them short
    logits, labels = logits_and_labels(rows, size, dtype=dtype)
    plain = logits.clone().requires_grad_()
    expected = F.cross_entropy(plain.float(), labels, ignore_index=IGNORE, reduction="none")
    expected.sum().backward(torch.tensor(3e-8))
    losses, gradients = both(logits, labels, 3e-8)
    assert torch.equal(losses, expected) and torch.equal(gradients, plain.grad)


def test_a_weight_of_a_large_batch_loses_no_gradient():
    """BF16 has FP32's exponents: scaled by 1e-8 before it is rounded, a gradient keeps its eight bits."""
    logits, labels = logits_and_labels(40, 300)
    _, unit = both(logits.clone(), labels, 1.0)
    _, tiny = both(logits.clone(), labels, 2.0**-27)
    normal = unit.float().abs() > 2.0**-95
    assert torch.equal((tiny.float() * 2.0**27)[normal], unit.float()[normal])
    assert bool((tiny[unit.float().abs() > 1e-30] != 0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_weight_a_token_is_each_row_with_its_own(dtype, monkeypatch):
    monkeypatch.setattr(twin, "_BLOCK", 2 * 33)  # several blocks
    logits, labels = logits_and_labels(7, 33, dtype=dtype)
    weights = torch.tensor([1.0, -2.0, 0.0, 3e-8, -1e-9, 5.0, 0.5])
    losses, gradients = torch.empty(7), logits.clone()
    cross_entropy_with_gradient(gradients, labels, weights, losses)
    for row, weight in enumerate(weights.tolist()):
        expected, alone = logits[row : row + 1].clone(), torch.empty(1)
        cross_entropy_with_gradient(expected, labels[row : row + 1], torch.tensor(weight), alone)
        assert torch.equal(gradients[row : row + 1], expected) and losses[row] == alone


def test_nothing_to_predict():
    logits, labels = logits_and_labels(6, 33)
    logits[2, 5] = float("nan")
    labels[:] = IGNORE
    losses, gradients = both(logits.nan_to_num(), labels, 1.0)
    assert not bool(losses.any()) and not bool(gradients.any())
    cross_entropy_with_gradient(logits, labels, torch.tensor(1.0), losses)
    assert not bool(losses.any()) and not bool(logits.any()), "a NaN that predicts nothing is overwritten too"
    losses, gradients = both(torch.empty(0, 33), labels[:0], 1.0)
    assert losses.shape == (0,) and gradients.shape == (0, 33)


def test_what_is_not_finite_shows():
    logits, labels = logits_and_labels(5, 40, dtype=torch.float32)
    labels[:] = 3
    logits[0, 7], logits[1, 7], logits[2, 7] = float("nan"), float("inf"), float("-inf")
    losses = torch.empty(5)
    cross_entropy_with_gradient(logits, labels, torch.tensor(1.0), losses)
    assert not bool(losses[:2].isfinite().any()) and bool(losses[2:].isfinite().all())
    assert bool(logits[:2].isnan().any(1).all()) and bool(logits[2:].isfinite().all()) and logits[2, 7] == 0


def test_what_does_not_fit_is_refused():
    logits, labels, losses = torch.zeros(4, 10), torch.tensor([1, IGNORE, 9, 0]), torch.empty(4)
    refused = [
        ("float64", logits.double(), labels, losses),
        (r"strided \[10, 4\]", logits.t(), labels, losses),
        (r"\[40\]", logits.flatten(), labels, losses),
        ("1 to 262144 columns, got 262145", logits.new_empty(4, (1 << 18) + 1), labels, losses),
        ("got 0", logits.new_empty(4, 0), labels, losses),
        (r"labels must be int64 \[4\]", logits, labels[:3], losses),
        ("int32", logits, labels.int(), losses),
        (r"losses must be FP32 \[4\]", logits, labels, losses[:3]),
        ("float64", logits, labels, losses.double()),
        ("below V=10 or -100, got -100 to 10", logits, labels + (labels == 9), losses),
        ("got -1 to", logits, labels.clamp(min=-1), losses),
    ]
    for message, *arguments in refused:
        with pytest.raises(ValueError, match=message):
            cross_entropy(*arguments)
    for weight in (torch.ones(1), torch.ones(4, 1), torch.tensor(1.0, dtype=torch.float64), torch.ones(4).double()):
        with pytest.raises(ValueError, match="weight must be an FP32 scalar"):
            cross_entropy_with_gradient(logits, labels, weight, losses)
