"""The record of experts: those of a forward of everything at once, whatever the batch, the ranks and the layers."""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch

from fp8moe.generate.groups import Sampled, sample_groups
from fp8moe.generate.routing import RoutingRecord, integers_for
from fp8moe.layers.dispatch import LocalDispatcher
from fp8moe.layers.recipe import Precision, Recipe
from fp8moe.model.transformer import Transformer
from fp8moe.parallel.dispatch import make_dispatcher
from fp8moe.parallel.mesh import build_mesh
from tests.generate.small import PROMPTS, TIMEOUT, alone, small_model
from tests.generate.test_groups import NAMES, options
from tests.parallel.ranks import run_ranks

LAYERS = {"num_layers": 4, "num_dense_layers": 1, "dense_layers": (2,)}  # experts in layers 1 and 3
EXPERTS = 4
ENDS = frozenset(range(0, 97, 7))


def chosen_at_once(model: Transformer, ids: list[int]) -> np.ndarray[Any, Any]:
    """[S, L, K]: experts of the tokens of one sequence, all in one forward without caches."""
    found: list[torch.Tensor] = []
    routers = [model.block(layer).moe.router for layer in (1, 3)]  # type: ignore[union-attr]
    hooks = [one.register_forward_hook(lambda *given: found.append(given[2].topk_ids_TK)) for one in routers]
    with torch.no_grad():
        model.logits(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return torch.stack(found, 1).numpy()


def check(groups: list[list[Sampled]]) -> None:
    model = small_model(**LAYERS)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for one in group:
            assert one.routing is not None and one.routing.dtype == np.uint8
            fed = [*prompt, *one.ids[:-1]]
            assert one.routing.shape == (len(fed), 2, 2)
            assert np.array_equal(one.routing, chosen_at_once(model, fed))


def test_experts_of_all_tokens_are_noted_whatever_the_batch() -> None:
    """Prompts of several lengths together, rows that end and leave early, prompts shared by the samples of a group."""
    model = small_model(**LAYERS)
    groups = sample_groups(model, PROMPTS, NAMES, options(ends=ENDS, routing=True), alone())
    assert len({len(one.ids) for group in groups for one in group}) > 4
    check(groups)
    check(sample_groups(model, PROMPTS, NAMES, options(ends=ENDS, routing=True, batch=6), alone()))
    assert not any(router._forward_hooks for router in model.modules())
    plain = sample_groups(model, PROMPTS, NAMES, options(ends=ENDS), alone())
    assert plain == groups and all(one.routing is None for group in plain for one in group)


def on_ranks() -> list[list[Sampled]]:
    mesh = build_mesh(1, 2, 2, timeout=TIMEOUT)
    dispatcher = make_dispatcher("all_to_all", mesh, EXPERTS, max_tokens=1)
    model = small_model(dispatcher=dispatcher, ep_rank=mesh.ep_rank, **LAYERS)
    return sample_groups(model, PROMPTS, NAMES, options(ends=ENDS, routing=True, batch=6), mesh)


def test_ranks_that_share_experts_note_the_same() -> None:
    first, second = run_ranks(on_ranks, 2)
    check(first)
    for one, other in zip(chain(*first), chain(*second), strict=True):
        assert one == other and np.array_equal(one.routing, other.routing)


def on_stages() -> tuple[list[list[int]], list[Any]]:
    """What the router of this rank's stage chooses for two tokens of row 1, and the record that all make of it."""
    mesh = build_mesh(2, 1, 1, timeout=TIMEOUT)
    config = small_model(**LAYERS, num_experts=300).config
    layers = [[0, 1], [2, 3]][mesh.pp_rank]
    part = Transformer(config, Recipe(Precision.FP32), LocalDispatcher(300), layers=layers, head=False)
    record = RoutingRecord(part, 2, 3)
    router = part.block(layers[1]).moe.router  # type: ignore[union-attr]
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(mesh.pp_rank))
    with record.noting(torch.tensor([1]), torch.tensor([1]), 2):
        chosen = router(torch.randn(2, config.dim), 1).topk_ids_TK
    return chosen.tolist(), [one.tolist() for one in record.of_rows([2, 3], mesh.pp_group)]


def test_stages_note_their_layers_and_put_them_together() -> None:
    (early, first), (late, second) = run_ranks(on_stages, 2)
    assert first == second and early != late
    none = [0, 0]
    assert first == [[[none, none]] * 2, [[none, none], [early[0], late[0]], [early[1], late[1]]]]


@pytest.mark.parametrize("experts, dtype", [(256, torch.uint8), (257, torch.int16), (2**15 + 1, torch.int32)])
def test_integers_are_as_small_as_they_may_be(experts: int, dtype: torch.dtype) -> None:
    assert integers_for(experts) is dtype and torch.tensor(experts - 1).to(dtype) == experts - 1
