"""The embedding's weight gradient in Triton, bit for bit the sum of tokens in their order."""

import pytest
import torch

from fp8moe.kernels.embedding import embedding_wgrad
from tests.kernels.test_embedding import VOCABULARY, in_order, problem


def in_triton(dy, ids, main_grad):
    embedding_wgrad(dy, ids, main_grad)
    return main_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("tokens", "dim"), [(1, 1), (40, 1072), (61, 24)])
def test_triton_is_the_specification_bit_for_bit(triton_device, tokens, dim, dtype):
    dy, ids, main_grad = problem(tokens, dim, dtype, triton_device)
    expected = in_order(dy, ids, main_grad)
    wide = torch.stack([dy, dy], 2)[..., 0]  # columns apart in memory
    assert torch.equal(in_triton(wide, ids, main_grad.clone()), expected)
    assert torch.equal(in_triton(dy, ids, main_grad), expected)


def test_runs_of_every_length(triton_device):
    lengths = (1, 7, 8, 9, 17, 2)
    ids = torch.cat([torch.full((n,), 2 * i) for i, n in enumerate(lengths)])
    ids = ids[torch.randperm(len(ids))].to(triton_device)
    dy = torch.randn(len(ids), 40, device=triton_device)
    main_grad = torch.zeros(VOCABULARY, 40, device=triton_device)
    assert torch.equal(in_triton(dy, ids, main_grad.clone()), in_order(dy, ids, main_grad))


def test_nothing_to_add(triton_device):
    main_grad = torch.ones(VOCABULARY, 16, device=triton_device)
    ids = torch.empty(0, dtype=torch.int64, device=triton_device)
    in_triton(torch.empty(0, 16, device=triton_device), ids, main_grad)
    assert bool((main_grad == 1).all())
