"""One step under every schedule and layout is the one-process step: routes, losses, norm, every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fp8moe.data.sampler import rank_slice
from fp8moe.layers.attention.zigzag import joined_parts
from fp8moe.layers.linear import main_grad_of
from fp8moe.layers.recompute import Recallable
from fp8moe.layers.router import Router, Routing, update_bias
from fp8moe.parallel.sharding.buckets import Span
from fp8moe.profile.spans import Stopwatch
from fp8moe.schedule.build import build_schedule
from fp8moe.train.run import Run
from fp8moe.train.step import Losses, forward_backward, next_batches, reduce
from tests.parallel.ranks import run_ranks
from tests.train.runs import built, configured

SEQUENCES, SEQ_LEN, LAYERS = 16, 16, 8
SETTINGS = (
    *(f"model.num_layers={LAYERS}", "model.num_dense_layers=4", "model.router.aux_loss_alpha=0.01", "run_dir=null"),
    *(f"batch.sequences={SEQUENCES}", "batch.micro_batch=1", "validation.samples=16", "seed=3", f"seq_len={SEQ_LEN}"),
)
LAYOUTS = [
    (schedule, pp, ep, ep)
    for schedule in ("1f1b", "zb1p", "dualpipe", "dualpipev")
    for pp in (1, 2, 4)
    for ep in (1, 2)
    if not (schedule == "dualpipe" and pp == 1)
] + [("1f1b", 1, 2, 1), ("1f1b", 1, 4, 2), ("1f1b", 1, 4, 4)]  # experts on more ranks than they are cut over


def one_step(settings: list[str], world_size: int) -> dict[str, Any]:
    """Forward, backward and reduction of this rank's part of one global batch; all that must not depend on layout."""
    run = built(configured(settings, world_size=world_size))
    parallel, mesh = run.config.parallel, run.mesh
    calls: dict[str, list[Tensor]] = {name: [] for name in run.routers()}
    gaps: list[float] = []

    def record(name: str) -> Any:
        def hook(router: Router, inputs: tuple[Recallable, int, object], routing: Routing) -> None:
            calls[name].append(routing.topk_ids_TK)
            gaps.append(gap(router, inputs[0].tensor))

        return hook

    for name, router in run.routers().items():
        router.register_forward_hook(record(name))
    batches, counts = next_batches(run)
    losses = forward_backward(run, batches, counts, 0.3, Stopwatch(run.device))
    norm = reduce(run)
    schedule = build_schedule(parallel.schedule, parallel.pp, len(batches))
    mine = rank_slice(list(range(SEQUENCES)), mesh.data_rank, mesh.data_ranks)
    seen: dict[str, list[int]] = {}
    for direction, stage in schedule.held_by(mesh.pp_rank):
        travelling = [mine[i] for i in range(len(batches)) if schedule.direction_of(i) == direction]
        for layer in run.stages[stage].layers:
            seen[f"blocks.{layer}.moe.router"] = travelling
        if run.stages[stage].mtp:
            seen["mtp.block.moe.router"] = travelling
    choices = {
        (name, sequence, mesh.cp_rank): ids
        for name, made in calls.items()
        for sequence, ids in zip(seen[name], made, strict=True)
    }
    loads = {name: router.counts_E.clone() for name, router in run.routers().items()}
    grads = {name: [(one.first, values.clone()) for one, values in found] for name, found in summed(run).items()}
    update_bias(run.model, 1e-3)
    biases = {name: router.bias_E.clone() for name, router in run.routers().items()}
    return {"losses": losses, "norm": norm, "choices": choices, "gap": min(gaps, default=1.0), "loads": loads,
            "biases": biases, "grads": grads, "ep_rank": mesh.ep_rank, "ep": mesh.ep,
            "tied": mesh.tie_group is not None}  # fmt: skip


def summed(run: Run) -> dict[str, list[tuple[Span, Tensor]]]:
    """By parameter, the values whose gradients this rank has the sums of."""
    names = {parameter: name for name, parameter in run.model.named_parameters()}
    found: dict[str, list[tuple[Span, Tensor]]] = {name: [] for name in names.values()}
    sharded = [] if run.zero is None else run.zero.buckets
    for one in sharded:
        for span in one.owned:
            found[names[span.parameter]].append((span, one.grad[span.start : span.stop]))
    for parameter, name in names.items():
        grad = main_grad_of(parameter)
        if not any(one.grad.untyped_storage().data_ptr() == grad.untyped_storage().data_ptr() for one in sharded):
            found[name].append((Span(parameter, 0, 0, grad.numel()), grad.flatten()))
    return found


def gap(router: Router, x_TD: Tensor) -> float:
    """The smallest distance between a chosen and a passed-over score: what rounding must bridge to flip a choice."""
    scores = torch.nn.functional.linear(x_TD.float(), router.weight.float()).sigmoid() + router.bias_E
    ordered = scores.sort(-1, descending=True).values
    k = router.config.topk
    return float((ordered[:, k - 1] - ordered[:, k]).detach().min())


@pytest.fixture(scope="module")
def alone(corpus: list[str]) -> dict[str, Any]:
    answer = one_step([*corpus, *SETTINGS, "precision=fp32"], 1)
    assert answer["gap"] > 1e-5, f"two experts nearly tie ({answer['gap']:.1e}): choose another seed"
    return answer


@pytest.mark.parametrize("schedule, pp, dp, ep", LAYOUTS)
def test_fp32_step_is_the_one_process_step(
    corpus: list[str], alone: dict[str, Any], schedule: str, pp: int, dp: int, ep: int
) -> None:
    world = pp * dp
    settings = [*corpus, *SETTINGS, "precision=fp32", f"parallel.pp={pp}", f"parallel.ep={ep}",
                f"parallel.schedule={schedule}"]  # fmt: skip
    answers = [one_step(settings, 1)] if world == 1 else run_ranks(one_step, world, settings, world)
    check(answers, alone, mtp_tied=schedule in ("1f1b", "zb1p") and pp > 1)


def check(answers: list[dict[str, Any]], alone: dict[str, Any], *, mtp_tied: bool) -> None:
    parts: dict[tuple[str, int], dict[int, Tensor]] = {}
    for answer in answers:
        for (name, sequence, rank), ids in answer["choices"].items():
            parts.setdefault((name, sequence), {})[rank] = ids
    choices = {
        (*key, 0): joined_parts(torch.stack([found[rank] for rank in range(len(found))]), 1)
        for key, found in parts.items()
    }
    assert choices.keys() == alone["choices"].keys()
    assert [key for key in choices if not torch.equal(choices[key], alone["choices"][key])] == []
    for answer in answers:
        for name in ("main", "mtp", "balance"):
            assert getattr(answer["losses"], name) == pytest.approx(getattr(alone["losses"], name), rel=1e-6)
        assert answer["norm"] == pytest.approx(alone["norm"], rel=1e-6)
        for kind in ("loads", "biases"):
            assert all(torch.equal(tensor, alone[kind][name]) for name, tensor in answer[kind].items())
    seen = {name: torch.zeros(len(whole), dtype=torch.bool) for name, ((_, whole),) in alone["grads"].items()}
    for answer in answers:
        for name, ranges in answer["grads"].items():
            ((_, whole),) = alone["grads"][name]
            for first, grad in ranges:
                start = first + (answer["ep_rank"] * len(whole) // answer["ep"] if "experts" in name else 0)
                expected = whole[start : start + len(grad)]
                distance = (grad - expected).norm() / whole.norm()
                assert distance <= 1e-5, f"{name}: {distance:.2e}"
                seen[name][start : start + len(grad)] = True
    assert [name for name, values in seen.items() if not values.all()] == []
    assert any(answer["tied"] for answer in answers) == mtp_tied
    for load in alone["loads"].values():
        assert load.sum() == SEQUENCES * SEQ_LEN * 2  # top-k


def steps_that_differ(settings: list[str], others: list[list[str]], world_size: int) -> list[str]:
    """What in one step depends on the settings that are added: losses, norm, or gradients, by name."""

    def a_step(added: list[str]) -> tuple[Losses, float, dict[str, Tensor]]:
        run = built(configured([*settings, *added], world_size=world_size))
        batches, counts = next_batches(run)
        losses = forward_backward(run, batches, counts, 0.3, Stopwatch(run.device))
        return losses, reduce(run), {name: p.main_grad.clone() for name, p in run.model.named_parameters()}  # type: ignore[attr-defined]

    losses, norm, grads = a_step(["parallel.overlap=false"])
    differing = []
    for added in others:
        theirs = a_step(added)
        differing += [f"{added} {name}" for name, grad in grads.items() if not torch.equal(grad, theirs[2][name])]
        if theirs[:2] != (losses, norm):
            differing.append(f"{added} losses or norm")
    return differing


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("schedule, pp, ep", [("dualpipev", 1, 2), ("dualpipe", 2, 2), ("1f1b", 1, 2)])
def test_overlap_and_recomputation_change_no_bit(
    corpus: list[str], precision: str, schedule: str, pp: int, ep: int
) -> None:
    settings = [*corpus, *SETTINGS, f"precision={precision}", f"parallel.pp={pp}", f"parallel.ep={ep}",
                f"parallel.schedule={schedule}", "model.num_layers=4", "model.num_dense_layers=2", "batch.sequences=8",
                "model.attention.v_dim=32"]  # heads alike: attention saves q, k, v  # fmt: skip
    others = [["recompute=[swiglu]"], ["recompute=[norm,mla_up,swiglu]"]]
    assert run_ranks(steps_that_differ, pp * ep, settings, others, pp * ep) == [[]] * (pp * ep)
