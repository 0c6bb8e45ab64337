"""Sums and norm of gradients on given buffers: what is reduced over which group, and what counts once."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fp8moe.layers.linear import MainGrads, attach_main_grads
from fp8moe.layers.recipe import Precision, Recipe
from fp8moe.layers.router import Router, RouterConfig
from fp8moe.parallel import gradients
from fp8moe.parallel.gradients import global_grad_norm, reduce_counts, reduce_gradients
from fp8moe.parallel.mesh import Mesh

Reduced = list[tuple[Any, int]]
GROUPS = {name: name for name in ("dense_group", "expert_group", "tie_group", "ep_group", "pp_group")}


def on(pp_rank: int, pp: int = 2, *, mirrored: bool = False) -> Mesh:
    return Mesh(pp, 1, 1, pp_rank, mirrored, **GROUPS)  # type: ignore[arg-type]


@pytest.fixture
def reduced(monkeypatch: pytest.MonkeyPatch) -> Reduced:
    """Every all-reduce: its group and elements; each group has two ranks with equal values."""
    calls: Reduced = []

    def double(tensor: Tensor, group: Any) -> Tensor:
        calls.append((group, tensor.numel()))
        return tensor.mul_(2)

    monkeypatch.setattr(gradients, "all_reduce", double)
    return calls


def test_each_buffer_is_summed_over_its_ranks_in_buckets(reduced: Reduced, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "BUCKET", 4)
    main_grads = MainGrads(torch.arange(10.0), torch.ones(3))
    reduce_gradients(main_grads, on(0))
    assert reduced == [("dense_group", 4), ("dense_group", 4), ("dense_group", 2), ("expert_group", 3)]
    assert torch.equal(main_grads.dense, 2 * torch.arange(10.0)) and torch.equal(
        main_grads.expert, torch.full((3,), 2.0)
    )


def test_a_tied_copy_is_summed_after_its_stages_ranks(reduced: Reduced) -> None:
    main_grads = MainGrads(torch.ones(6), torch.ones(2))
    reduce_gradients(main_grads, on(0), tied=main_grads.dense[2:4])
    assert reduced[-1] == ("tie_group", 2)
    assert main_grads.dense.tolist() == [2, 2, 4, 4, 2, 2]


def test_the_norm_is_of_all_parameters_with_experts_of_every_ep_rank(reduced: Reduced) -> None:
    main_grads = MainGrads(torch.tensor([3.0, 4.0]), torch.tensor([5.0]))
    assert global_grad_norm(main_grads, on(0)) == pytest.approx(math.sqrt(2 * (9 + 16 + 2 * 25)))
    assert [group for group, _ in reduced] == ["ep_group", "pp_group"]


class Tied(nn.Module):
    """A copy of the embedding that is not the first parameter, with one before and one after it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.embedding, self.head = (nn.Parameter(torch.zeros(n)) for n in (2, 3, 1))


@pytest.mark.parametrize("copy, others", [("norm", [3, 4, 5, 6]), ("embedding", [1, 2, 6]), ("head", [1, 2, 3, 4, 5])])
def test_a_copy_counts_elsewhere_wherever_it_stands(reduced: Reduced, copy: str, others: list[float]) -> None:
    model = Tied()
    main_grads = attach_main_grads(model)
    main_grads.dense.copy_(torch.arange(1.0, 7.0))
    left_out = getattr(model, copy).main_grad
    expected = math.sqrt(2 * sum(value * value for value in others))
    assert global_grad_norm(main_grads, on(1), copy=left_out) == pytest.approx(expected, rel=1e-12)


def test_a_copy_that_comes_first_changes_no_bit() -> None:
    dense = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    alone = Mesh(1, 1, 1, 0)
    rest = float(torch.linalg.vector_norm(dense[300:], dtype=torch.float64).square().sqrt())
    assert global_grad_norm(MainGrads(dense, torch.zeros(0)), alone, copy=dense[:300]) == rest
    with pytest.raises(AssertionError, match="view of the dense buffer"):
        global_grad_norm(MainGrads(dense, torch.zeros(0)), alone, copy=torch.ones(3))


@pytest.mark.parametrize("pp_rank, counted", [(0, True), (1, True), (2, False), (3, False)])
def test_of_two_pipeline_ranks_with_the_same_stage_one_counts(reduced: Reduced, pp_rank: int, counted: bool) -> None:
    norm = global_grad_norm(MainGrads(torch.tensor([3.0, 4.0]), torch.zeros(0)), on(pp_rank, 4, mirrored=True))
    assert norm == pytest.approx(math.sqrt(2 * 25) if counted else 0.0)


def test_counts_of_all_routers_are_summed_in_one_message(reduced: Reduced) -> None:
    routers = [Router(4, experts, RouterConfig(topk=1), Recipe(Precision.FP32)) for experts in (2, 3)]
    for router in routers:
        router.counts_E.copy_(torch.arange(1, len(router.counts_E) + 1))
    reduce_counts(nn.ModuleList([*routers, nn.Linear(1, 1)]), on(0))
    assert reduced == [("dense_group", 5)]
    assert [router.counts_E.tolist() for router in routers] == [[2, 4], [2, 4, 6]]
    reduce_counts(nn.Linear(1, 1), on(0))  # a stage without routers sends nothing
    assert len(reduced) == 1
