"""Router replay: an update is plain autograd with the rollout's experts; layouts, files and refusals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fp8moe.cli.compose import as_yaml
from fp8moe.errors import ConfigError
from fp8moe.layers.linear import main_grad_of
from fp8moe.layers.recompute import kept
from fp8moe.layers.router import Router, Routing
from fp8moe.post.grpo import Grpo
from fp8moe.post.packed import Packed, pack
from fp8moe.post.policy import group_advantages, token_shares
from fp8moe.post.replay import RoutingChanges
from fp8moe.post.rollouts import Rollouts, load, save
from fp8moe.profile.spans import Stopwatch
from fp8moe.train.loop import train
from fp8moe.train.run import Run
from fp8moe.train.step import forward_backward, forward_passes
from tests.parallel.ranks import run_ranks
from tests.post.runs import policy_config, policy_run
from tests.post.test_grpo import last_checkpoint, steps

REPLAY = ("grpo.router_replay=true", "model.num_layers=3", "grpo.prompts=2", "grpo.max_tokens=8")
BATCH_OF_TWO = (
    *REPLAY,
    "grpo.samples=4",
    "grpo.minibatches=2",
    "model.router.bias_gamma=0.5",
    "optimizer.schedule.peak=1e-6",
)


def perturb(run: Run) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for router in run.routers().values():
            router.weight += 0.1 * torch.randn(router.weight.shape, generator=generator)


@contextmanager
def noted(run: Run, what: list[Routing]) -> Iterator[None]:
    """What routers say, as long as the block runs."""
    hooks = [one.register_forward_hook(lambda *given: what.append(given[2])) for one in run.routers().values()]
    yield
    for hook in hooks:
        hook.remove()


def plain_objective(run: Run, rollouts: Rollouts, monkeypatch: pytest.MonkeyPatch) -> float:
    """The objective, sample by sample, and its gradients by ordinary autograd: a router is five lines here."""
    model, grpo = run.model, run.config.grpo
    forced: dict[Router, Tensor] = {}

    def plain_router(router: Router, x: Any, *rest: Any) -> Routing:
        scores = (kept(x).tensor.double() @ router.weight.double().T).sigmoid().gather(1, forced[router])
        weights = scores / scores.sum(-1, keepdim=True) * router.config.route_scale
        return Routing(forced[router], weights.float(), torch.zeros(()))

    advantages = group_advantages(rollouts.rewards, rollouts.group, normalize_std=grpo.normalize_std)
    shares = token_shares(rollouts.lengths, advantages.is_scored, grpo)
    total = 0.0
    with monkeypatch.context() as patched:
        patched.setattr(Router, "forward", plain_router)
        for n in advantages.is_trained.nonzero().flatten().tolist():
            prompt, completion = rollouts.prompts[n // rollouts.group], torch.tensor(rollouts.completions[n])
            ids = torch.cat([torch.tensor(prompt), completion])[:-1]
            assert rollouts.routing is not None and len(rollouts.routing[n]) == len(ids)
            for number, layer in enumerate((1, 2)):
                moe = model.block(layer).moe
                assert moe is not None
                forced[moe.router] = torch.from_numpy(rollouts.routing[n][:, number].astype(np.int64))
            hidden, _ = model.run_blocks(model.embedding(ids), model.positions(torch.arange(len(ids))[None]))  # type: ignore[misc]
            logits = model.head(model.norm(hidden))[len(prompt) - 1 :].double()  # type: ignore[misc]
            logp = logits.log_softmax(-1).gather(1, completion[:, None])[:, 0]
            at = slice(rollouts.starts[n], rollouts.starts[n + 1])
            old, rollout, reference = (
                one[at].double()
                for one in (rollouts.old, rollouts.rollout, rollouts.reference)  # type: ignore[index]
            )
            ratio, advantage = (logp - old).exp(), advantages.of_samples[n]
            surrogate = torch.min(ratio * advantage, ratio.clamp(1 - grpo.clip_low, 1 + grpo.clip_high) * advantage)
            factor = (old - rollout).exp().clamp(max=grpo.importance_cap)
            k3 = (reference - logp).exp() - (reference - logp) - 1
            loss = shares[n] * (grpo.kl * k3 - factor * surrogate).sum()
            loss.backward()
            total += loss.item()
    return total


def test_an_update_is_plain_autograd_with_the_rollouts_experts(
    corpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With routers that have changed since, so that hardly a token would go where it is sent."""
    run, method = policy_run(policy_config(corpus, *REPLAY, "grpo.kl=0.05", "data.document_mask=true"))
    work = method.work(run)
    assert method._batch is not None
    rollouts = method._batch.rollouts
    perturb(run)

    expected_loss = plain_objective(run, rollouts, monkeypatch)
    parameters = dict(run.model.named_parameters())
    expected = {name: main_grad_of(p).clone() for name, p in parameters.items()}
    expected |= {f"{name}.weight": router.weight.grad for name, router in run.routers().items()
                 if router.weight.grad is not None}  # fmt: skip
    assert sum(name.endswith("router.weight") and bool(grad.any()) for name, grad in expected.items()) == 2

    routings: list[Routing] = []
    run.model.main_grads.zero_()
    with noted(run, routings):
        losses = forward_backward(run, work.batches, work.counts, 0.0, Stopwatch(run.device), work.token_loss)
    assert losses.main == pytest.approx(expected_loss, rel=1e-4)
    largest = max(float(grad.norm()) for grad in expected.values())
    for name, parameter in parameters.items():
        apart = float((main_grad_of(parameter) - expected[name]).norm())
        assert apart < 2e-5 * max(float(expected[name].norm()), 1e-2 * largest), name
    of_layers = [one for one in routings if one.own_ids_TK is not None]
    assert len(of_layers) == 2 * len(work.batches) < len(routings), "the MTP module's chooses as ever"
    changed = [float((one.own_ids_TK.sort().values != one.topk_ids_TK.sort().values).double().mean())  # type: ignore[union-attr]
               for one in of_layers]  # fmt: skip
    assert min(changed) > 0.1


def test_given_experts_are_used_in_evaluation_and_what_the_routers_would_change_is_counted(
    corpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, method = policy_run(policy_config(corpus, *REPLAY))
    are_given, logprobs = [], method._logprobs

    def noting(run: Run, rollouts: Rollouts, packed: Packed) -> Tensor:
        are_given.append([batch.experts_BSLK is not None for batch in packed.batches])
        return logprobs(run, rollouts, packed)

    monkeypatch.setattr(method, "_logprobs", noting)
    method.work(run)
    old, reference = are_given
    assert all(old) and not any(reference), "the reference chooses its own"
    assert method._batch is not None and method.figures(run)["routing_changed"] == 0
    rollouts = method._batch.rollouts
    packed = pack(rollouts, range(len(rollouts.completions)), run, least=1, multiple=1)
    perturb(run)
    routings: list[Routing] = []
    with noted(run, routings), RoutingChanges(run) as changes:
        forward_passes(run, packed.batches)
    assert len(routings) == 2 * len(packed.batches)
    changed = chosen = 0
    for number, one in enumerate(routings):
        batch = packed.batches[number // 2]
        assert batch.experts_BSLK is not None and one.own_ids_TK is not None
        given_TK = batch.experts_BSLK[:, :, number % 2].flatten(0, 1).long()
        for given, used, own in zip(given_TK.tolist(), one.topk_ids_TK.tolist(), one.own_ids_TK.tolist(), strict=True):
            assert used == (own if -1 in given else given)
            changed += len(set(used) - set(own))
            chosen += 0 if -1 in given else len(used)
    assert rollouts.routing is not None and chosen == sum(one.size for one in rollouts.routing)
    found = changes.figures(rollouts.routing)["routing_changed"]
    assert found == changed / chosen > 0.1
    assert not any(router._forward_hooks for router in run.routers().values())
    with RoutingChanges(run) as changes:
        forward_passes(run, packed.with_own_experts().batches)
    assert changes.figures(rollouts.routing) == {"routing_changed": 0.0} and changes.figures(None) == {}


@cache
def alone(corpus: tuple[str, ...]) -> list[dict[str, Any]]:
    """Both updates of a batch by one process."""
    return steps(policy_config([*corpus], *BATCH_OF_TWO), 2)


def test_later_updates_of_a_batch_keep_its_experts(corpus: list[str]) -> None:
    """Biases of routers move far after every update: without replay the second update has other experts."""
    with_replay = alone(tuple(corpus))
    without = steps(policy_config(corpus, *BATCH_OF_TWO, "grpo.router_replay=false"), 2)
    assert with_replay[0]["routing_changed"] == 0 and "routing_changed" not in without[0]
    assert with_replay[0]["loss"] == pytest.approx(without[0]["loss"], rel=1e-5)
    assert without[1]["ratio_deviation"] > 0.05 > 50 * with_replay[1]["ratio_deviation"]


@pytest.mark.parametrize(
    ("world_size", "settings"), [(2, ("parallel.ep=2", "batch.micro_batch=2")), (1, ("parallel.schedule=dualpipev",))]
)
def test_layouts_agree(world_size: int, settings: tuple[str, ...], corpus: list[str]) -> None:
    expected = alone(tuple(corpus))
    config = policy_config(corpus, *BATCH_OF_TWO, *settings, world_size=world_size)
    ranks = run_ranks(steps, world_size, config, 2) if world_size > 1 else [steps(config, 2)]
    for found in ranks:
        assert found[0]["routing_changed"] == 0 and found[0]["mismatch_largest"] < 1e-4
        for name in ("tokens", "loss", "grad_norm", "kl", "ratio_deviation", "clip_share"):
            assert [one[name] for one in found] == pytest.approx([one[name] for one in expected], rel=2e-3, abs=1e-6)


def test_a_run_that_resumes_within_a_batch_is_the_same_to_the_bit(corpus: list[str], tmp_path: Path) -> None:
    every = (
        *BATCH_OF_TWO,
        "grpo.kl=0",
        "checkpoint.every=1",
        "validation.every=0",
        "plan=off",
        "grpo.held_out_count=0",
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(policy_config(corpus, *every, "steps=2", f"run_dir={whole}"), as_yaml, method=Grpo())
    train(policy_config(corpus, *every, "steps=1", f"run_dir={cut}"), as_yaml, method=Grpo())
    train(policy_config(corpus, *every, "steps=2", f"run_dir={cut}", "resume=required"), as_yaml, method=Grpo())
    assert last_checkpoint(whole) == last_checkpoint(cut)


def rollouts(lengths: list[tuple[int, int]], dtype: Any = np.uint8) -> Rollouts:
    """Groups of two with prompts and completions of these lengths; experts are numbered through."""
    samples, count = 2 * len(lengths), 0
    routing = []
    for prompt, completion in (one for one in lengths for _ in range(2)):
        inputs = prompt + completion - 1
        routing.append(np.arange(count, count + inputs * 6).reshape(inputs, 3, 2).astype(dtype))
        count += inputs * 6
    tokens = sum(2 * completion for _, completion in lengths)
    return Rollouts(
        tuple(tuple(range(prompt)) for prompt, _ in lengths),
        tuple(tuple(range(completion)) for _, completion in lengths for _ in range(2)),
        torch.ones(samples, dtype=torch.bool), torch.randn(tokens), torch.zeros(samples).double(),
        torch.zeros(samples, 1).double(), torch.zeros(tokens), routing=tuple(routing),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32])
def test_a_batch_that_is_kept_has_its_experts(dtype: Any, tmp_path: Path) -> None:
    made = rollouts([(3, 4), (1, 1), (5, 2)], dtype)
    save(made, tmp_path, 7)
    found = load(tmp_path, 7)
    assert found is not None and found.completions == made.completions
    for one, other in ((found, made), (made.only([0]).joined(made.only([1, 2])), made)):
        assert one.routing is not None and other.routing is not None
        for ours, theirs in zip(one.routing, other.routing, strict=True):
            assert ours.dtype == dtype and np.array_equal(ours, theirs)
    chosen = made.only([2, 0]).routing
    assert chosen is not None and made.routing is not None
    assert [len(one) for one in chosen] == [6, 6, 6, 6] and np.array_equal(chosen[1], made.routing[5])
    save(replace(made, routing=None), tmp_path, 8)
    without = load(tmp_path, 8)
    assert without is not None and without.routing is None


def test_what_can_not_be_replayed_is_refused(corpus: list[str]) -> None:
    server = ("grpo.server=http://127.0.0.1:1/v1", "grpo.server_model=policy", "grpo.refresh_command=[x,'{path}']")
    with pytest.raises(
        ValueError, match=r"grpo.router_replay=true needs the experts of every token and grpo.server giv"
    ):
        policy_config(corpus, *REPLAY, *server)
    dense = ("model.num_dense_layers=3", "model.mtp_depth=0")
    with pytest.raises(ConfigError, match=r"the model has 0 layers with experts: use grpo.router_replay=false"):
        policy_run(policy_config(corpus, *REPLAY, *dense))
