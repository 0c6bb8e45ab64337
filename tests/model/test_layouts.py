"""One step on every layout equals the one-process step: choices, loss, clip norm, every parameter's gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fp8moe.layers.dispatch import Dispatcher, LocalDispatcher
from fp8moe.layers.linear import is_expert
from fp8moe.layers.recipe import Precision, Recipe
from fp8moe.layers.recompute import Recallable
from fp8moe.layers.router import Router, Routing, update_bias
from fp8moe.model.loss import LossCounts, count_predicted, loss_weights, total_loss
from fp8moe.model.transformer import Transformer, init_weights
from fp8moe.parallel.dispatch.all_to_all import AllToAllDispatcher, one_hop
from fp8moe.parallel.gradients import global_grad_norm, reduce_counts, reduce_gradients
from fp8moe.parallel.mesh import build_mesh
from tests.model.batches import tokens
from tests.model.hf_oracle import BASE
from tests.model.shapes import changed
from tests.parallel.ranks import TIMEOUT, run_ranks

CONFIG = changed(BASE, num_layers=3, mtp_depth=1)
SEQUENCES, SEQ_LEN = 4, 32
ROUTERS = 3  # two blocks with experts, and the MTP module's


def one_step(dp: int, ep: int, precision: Precision) -> dict[str, Any]:
    """Forward and backward of this rank's share of one global batch, reduced; all that must not depend on layout."""
    mesh = build_mesh(1, dp, ep, timeout=TIMEOUT)
    dispatcher: Dispatcher = LocalDispatcher(CONFIG.experts.num_experts)
    if mesh.ep_group is not None:
        dispatcher = AllToAllDispatcher(*one_hop(mesh.ep_group, CONFIG.experts.num_experts))
    model = Transformer(CONFIG, Recipe(precision), dispatcher)
    init_weights(model, seed=0, ep_rank=mesh.ep_rank)
    choices: list[Tensor] = []
    gaps: list[float] = []

    def record(router: torch.nn.Module, inputs: tuple[Recallable, int], routing: Routing) -> None:
        assert isinstance(router, Router)
        choices.append(routing.topk_ids_TK)
        gaps.append(gap(router, inputs[0].tensor))

    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(record)

    batch = tokens(CONFIG.vocab_size, batch=SEQUENCES, seq_len=SEQ_LEN, seed=5)  # without near-ties: see `gap`
    share = SEQUENCES // dp
    counts = LossCounts(*count_predicted(batch.labels_BS), sequences=SEQUENCES)
    mine = batch.sequences(slice(mesh.rank * share, (mesh.rank + 1) * share))
    loss = total_loss(model(mine), loss_weights(counts, mtp_weight=0.3, balance_alpha=1e-2))
    loss.backward()
    reduce_gradients(model.main_grads, mesh)
    reduce_counts(model, mesh)
    loads = torch.stack([m.counts_E.clone() for m in model.modules() if isinstance(m, Router)])
    norm = global_grad_norm(model.main_grads, mesh)
    update_bias(model, gamma=1e-3)
    biases = torch.stack([m.bias_E for m in model.modules() if isinstance(m, Router)])
    grads = {name: (p.main_grad.clone(), is_expert(p)) for name, p in model.named_parameters()}
    return {"loss": loss.item(), "norm": norm, "choices": choices, "gap": min(gaps), "loads": loads,
            "biases": biases, "grads": grads, "ep_rank": mesh.ep_rank, "edp_rank": mesh.edp_rank}  # fmt: skip


def gap(router: Router, x_TD: Tensor) -> float:
    """The smallest distance of any two biased scores of a token: what rounding must bridge to flip a choice."""
    scores = torch.nn.functional.linear(x_TD.float(), router.weight.float()).sigmoid() + router.bias_E
    ordered = scores.sort(-1).values
    return float((ordered[:, 1:] - ordered[:, :-1]).detach().min())


def gathered(answers: list[dict[str, Any]], name: str) -> Tensor:
    """A parameter's whole gradient: dense from any rank, experts stacked in order of ep rank."""
    grad, expert = answers[0]["grads"][name]
    if not expert:
        return grad
    shares = {a["ep_rank"]: a["grads"][name][0] for a in answers if a["edp_rank"] == 0}
    return torch.cat([shares[r] for r in sorted(shares)])


@pytest.mark.parametrize("dp, ep", [(2, 1), (2, 2), (4, 2), (4, 4)])
def test_fp32_step_is_the_one_process_step(dp: int, ep: int) -> None:
    expected = one_step(1, 1, Precision.FP32)
    assert expected["gap"] > 1e-5, "two experts nearly tie: choose another seed"
    answers = run_ranks(one_step, dp, dp, ep, Precision.FP32)

    for layer in range(ROUTERS):
        ids = torch.cat([a["choices"][layer] for a in answers])
        assert torch.equal(ids, expected["choices"][layer])
    assert sum(a["loss"] for a in answers) == pytest.approx(expected["loss"], rel=1e-6)
    for answer in answers:
        assert answer["norm"] == pytest.approx(expected["norm"], rel=1e-6)
        assert torch.equal(answer["loads"], expected["loads"])
        assert torch.equal(answer["biases"], expected["biases"])
    for name, (grad, _) in expected["grads"].items():
        distance = (gathered(answers, name) - grad).norm() / grad.norm()
        assert distance <= 1e-5, f"{name}: {distance:.2e}"
    assert expected["loads"].sum() == ROUTERS * SEQUENCES * SEQ_LEN * CONFIG.router.topk


def test_fp8_step_hardly_depends_on_the_layout() -> None:
    expected = one_step(1, 1, Precision.FP8)
    answers = run_ranks(one_step, 4, 4, 4, Precision.FP8)
    assert sum(a["loss"] for a in answers) == pytest.approx(expected["loss"], rel=1e-4)
    assert answers[0]["norm"] == pytest.approx(expected["norm"], rel=2e-2)
    assert all(torch.isfinite(grad).all() and grad.any() for grad, _ in answers[0]["grads"].values())
