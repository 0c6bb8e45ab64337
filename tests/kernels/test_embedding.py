"""The embedding's weight gradient: FP64 of its definition, the order of its sums."""

import pytest
import torch

from fp8moe.kernels import backend
from fp8moe.kernels.embedding import embedding_wgrad
from fp8moe.kernels.reference import embedding as twin

VOCABULARY = 11


def problem(tokens, dim, dtype, device="cpu"):
    """dy whose sums depend on their order, ids that leave some rows out and repeat one often, and a main_grad."""
    dy = (torch.randn(tokens, dim, device=device) * torch.logspace(-4, 4, tokens, device=device)[:, None]).to(dtype)
    ids = torch.randint(VOCABULARY - 2, (tokens,), device=device)
    ids[torch.randperm(tokens, device=device)[: tokens // 2]] = 4
    return dy, ids, torch.randn(VOCABULARY, dim, device=device)


def in_order(dy, ids, main_grad):
    """The definition, a token at a time."""
    total = main_grad.clone()
    for t in range(len(ids)):
        total[ids[t]] += dy[t].float()
    return total


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("tokens", "dim"), [(1, 1), (40, 24), (300, 7)])
def test_tokens_are_added_in_their_order(tokens, dim, dtype):
    backend.set_backend("reference")
    dy, ids, main_grad = problem(tokens, dim, dtype)
    expected, before = in_order(dy, ids, main_grad), main_grad.clone()
    embedding_wgrad(dy, ids, main_grad)
    backend.set_backend(None)
    assert torch.equal(main_grad, expected)
    one_hot = torch.nn.functional.one_hot(ids, VOCABULARY).double()
    exact = before.double() + one_hot.T @ dy.double()
    sizes = before.double().abs() + one_hot.T @ dy.double().abs()
    assert bool(((main_grad - exact).abs() <= 2.0**-20 * sizes).all())


def test_nothing_to_add():
    main_grad = torch.ones(VOCABULARY, 16)
    twin.embedding_wgrad(torch.empty(0, 16), torch.empty(0, dtype=torch.int64), main_grad)
    assert bool((main_grad == 1).all())


def test_what_does_not_fit_is_refused():
    dy, ids, main_grad = torch.zeros(4, 16), torch.zeros(4, dtype=torch.int64), torch.zeros(VOCABULARY, 16)
    refused = [
        ("float64", dy.double(), ids, main_grad),
        (r"\[4, 2, 8\]", dy.unflatten(1, (2, 8)), ids, main_grad),
        (r"ids must be int64 \[4\]", dy, ids[:3], main_grad),
        ("int32", dy, ids.int(), main_grad),
        ("bfloat16", dy, ids, main_grad.bfloat16()),
        (r"\[11, 8\]", dy, ids, main_grad[:, :8].contiguous()),
        ("strided", dy, ids, main_grad.t().contiguous().t()),
        (r"\[176\]", dy, ids, main_grad.flatten()),
    ]
    for message, *arguments in refused:
        with pytest.raises(ValueError, match=message):
            embedding_wgrad(*arguments)
