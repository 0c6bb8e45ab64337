"""Cross entropy in Triton: within the bounds of FP64, and near the specification; what is ignored is exactly zero."""

import pytest
import torch

from fp8moe.kernels.cross_entropy import IGNORE, cross_entropy, cross_entropy_with_gradient
from fp8moe.kernels.reference import cross_entropy as twin
from tests.kernels.loss_rows import STORAGE, assert_within_bounds, logits_and_labels

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")  # the interpreter is NumPy


@pytest.mark.parametrize("weight", [1.0, 1e-8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (9, 259), (6, 4096), (5, 9000)])
def test_it_stays_within_the_bounds_of_fp64(triton_device, rows, size, dtype, weight):
    logits, labels = logits_and_labels(rows, size, device=triton_device, dtype=dtype)
    losses, alone = torch.full((2, rows), float("nan"), device=triton_device)
    gradients = logits.clone()
    cross_entropy(gradients, labels, alone)
    assert torch.equal(gradients, logits)
    cross_entropy_with_gradient(gradients, labels, torch.tensor(weight, device=triton_device), losses)
    assert torch.equal(losses, alone)
    assert_within_bounds(losses, gradients, logits, labels, weight, storage=STORAGE[dtype])


def test_a_vocabulary_of_production_and_labels_that_stride(triton_device):
    logits, labels = logits_and_labels(3, 129_280, device=triton_device)
    apart, losses = torch.stack([labels, labels + 1], 1)[:, 0], torch.empty(3, 2, device=triton_device)[:, 0]
    gradients, expected = logits.clone(), logits.clone()
    cross_entropy_with_gradient(gradients, apart, torch.tensor(1e-8, device=triton_device), losses)
    exact = torch.empty(3, device=triton_device)
    twin.cross_entropy_with_gradient(expected, labels, torch.tensor(1e-8, device=triton_device), exact)
    torch.testing.assert_close(losses, exact, rtol=2e-6, atol=0.0)
    torch.testing.assert_close(gradients, expected, rtol=2.0**-7, atol=1e-15)
    assert_within_bounds(losses, gradients, logits, labels, 1e-8, storage=STORAGE[torch.bfloat16])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_weight_a_token(triton_device, dtype):
    logits, labels = logits_and_labels(6, 700, device=triton_device, dtype=dtype)
    weights = torch.tensor([[1.0, -2.0, 3e-8, 0.0, -1e-9, 5.0], [9.0] * 6], device=triton_device).T[:, 0]  # it strides
    losses, gradients = torch.empty(6, device=triton_device), logits.clone()
    cross_entropy_with_gradient(gradients, labels, weights, losses)
    for row in range(6):
        expected, alone = logits[row : row + 1].clone(), torch.empty(1, device=triton_device)
        cross_entropy_with_gradient(expected, labels[row : row + 1], weights[row].clone(), alone)
        assert torch.equal(gradients[row : row + 1], expected) and losses[row] == alone


def test_nothing_to_predict_and_what_is_not_finite(triton_device):
    logits, labels = logits_and_labels(6, 700, device=triton_device, dtype=torch.float32)
    labels[:] = 3
    logits[0, 7], logits[1, 7], logits[2, 7] = float("nan"), float("inf"), float("-inf")
    logits[3:5, 100], labels[3:5] = float("nan"), IGNORE
    losses = torch.empty(6, device=triton_device)
    cross_entropy_with_gradient(logits, labels, torch.tensor(1.0, device=triton_device), losses)
    assert not bool(losses[:2].isfinite().any()) and bool(losses[2:].isfinite().all())
    assert bool(logits[:2].isnan().any(1).all()) and bool(logits[2:].isfinite().all()) and logits[2, 7] == 0
    assert not bool(losses[3:5].any()) and not bool(logits[3:5].any())
    none = torch.empty(0, device=triton_device)
    cross_entropy_with_gradient(logits[:0], labels[:0], torch.tensor(1.0, device=triton_device), none)


def test_a_label_that_the_vocabulary_lacks_predicts_nothing_on_a_gpu(triton_device):
    from fp8moe.kernels.triton import cross_entropy as ours

    logits, losses = torch.ones(3, 300, device=triton_device), torch.empty(3, device=triton_device)
    labels = torch.tensor([300, -1, 299], device=triton_device)
    ours.cross_entropy_with_gradient(logits, labels, torch.tensor(1.0, device=triton_device), losses)
    assert losses[:2].tolist() == [0, 0] and losses[2] > 5
    assert not bool(logits[:2].any()) and logits[2, 299] < 0
