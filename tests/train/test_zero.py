"""Training with sharded optimizer state is the training without it: weights, masters and moments, on every layout."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from fp8moe.layers.linear import QuantizedWeight, main_grad_of
from fp8moe.model.stage import pass_parameters
from fp8moe.parallel.sharding import zero
from fp8moe.train.loop import _validations, averaged_weights
from fp8moe.train.memory import expected_bytes, measured_bytes, replicas_of
from fp8moe.train.step import train_step
from tests.parallel.ranks import run_ranks
from tests.train.runs import built, configured, weights_of

SETTINGS = ("model.num_layers=4", "batch.sequences=8", "batch.micro_batch=1", "seq_len=16", "run_dir=null")
STEPS = 2  # in the second the first one's moments and masters count
DUALPIPE = ("parallel.pp=2", "parallel.schedule=dualpipe")
FEW = ("batch.sequences=4", "validation.samples=4")  # enough for two stages
LAYOUTS: list[tuple[int, tuple[str, ...]]] = [  # processes, settings
    (2, ("parallel.ep=1",)),
    (4, ("parallel.ep=2",)),
    (2, DUALPIPE),
    (4, ("parallel.pp=2", "parallel.schedule=zb1p", "parallel.ep=1")),  # a tied embedding, on two replicas each
]


def trained(settings: list[str], world_size: int, steps: int) -> dict[str, Any]:
    """This rank's weights and FP8 codes, what its optimizer holds, and losses and norms, after some steps."""
    run = built(configured(settings, world_size=world_size))
    reports = [train_step(run) for _ in range(steps)]
    weights = weights_of(run)
    for name, module in run.model.named_modules():
        if isinstance(module, QuantizedWeight) and module.recipe.fp8:
            for kind, q in (("rows", module.blocks), ("transposed", module.transposed_blocks)):
                weights[f"{name}.{kind}"], weights[f"{name}.{kind}.scale"] = q.data.view(torch.uint8), q.scale
    held = {
        (name, kind, one.first): tensor.clone()
        for name, ranges in run.optimizer.held.items()
        for one in ranges
        for kind, tensor in one.tensors.items()
    }
    return {"weights": weights, "held": held, "numbers": [(r.loss, r.grad_norm) for r in reports]}


@pytest.mark.parametrize(
    ("world_size", "layout", "of"),
    [
        *((world_size, layout, (f"precision={name}",)) for world_size, layout in LAYOUTS for name in ("fp32", "fp8")),
        # Not of four replicas: Newton-Schulz rounds to BF16, and a last bit of the gradient becomes one of BF16.
        *((world_size, layout, ("precision=fp8", "optimizer=muon")) for world_size, layout in LAYOUTS[2:]),
    ],
)
def test_sharded_is_unsharded(corpus: list[str], of: tuple[str, ...], world_size: int, layout: tuple[str, ...]) -> None:
    """Sums of two ranks associate in one way only, so they agree to the bit; those of four to 1e-6 a step."""
    few = FEW if "parallel.pp=2" in layout else ()
    settings = [*corpus, *SETTINGS, *few, *layout, *of, "optimizer.clip_norm=0.5",
                "optimizer.eps=1e-3"]  # else AdamW makes a whole step of a small gradient's last bit  # fmt: skip
    whole, sharded = (
        run_ranks(trained, world_size, [*settings, f"optimizer.sharding={how}"], world_size, STEPS)
        for how in ("none", "zero1")
    )
    replicas = world_size if layout in (("parallel.ep=2",), DUALPIPE) else 2
    seen: dict[tuple[str, str], int] = {}
    for one, other in zip(whole, sharded, strict=True):
        for (loss, norm), (their_loss, their_norm) in zip(one["numbers"], other["numbers"], strict=True):
            assert loss == pytest.approx(their_loss, rel=1e-6) and norm == pytest.approx(their_norm, rel=1e-6)
        for name, weight in one["weights"].items():
            assert_same(other["weights"][name], weight, name, exact=replicas == 2)
        for (name, kind, first), values in other["held"].items():
            expected = one["held"][name, kind, 0][first : first + len(values)]
            assert_same(values, expected, f"{kind} of {name}", exact=replicas == 2)
            seen[name, kind] = seen.get((name, kind), 0) + len(values)
    for (name, kind), count in seen.items():
        (size,) = {len(one["held"][name, kind, 0]) for one in whole if (name, kind, 0) in one["held"]}
        shares = 2 if "experts" in name and "parallel.ep=2" in layout else 1
        copies = 2 if name == "embedding.weight" and "parallel.schedule=zb1p" in layout else 1  # on either end
        assert count == size * shares * copies, f"{kind} of {name} is held once"


def assert_same(ours: Tensor, theirs: Tensor, what: str, *, exact: bool) -> None:
    if exact:
        assert torch.equal(ours, theirs), what
    elif ours.dtype is torch.float32 and not what.startswith(("exp_avg", "momentum")):
        distance = float((ours - theirs).norm() / theirs.norm())
        assert distance <= STEPS * 1e-6, f"{what}: {distance:.1e}"


def validated(settings: list[str], seconds: float) -> float:
    """The validation loss after a step whose weights take so long to come back, each bucket of them."""
    gather = zero._gather

    def late(bucket: zero.ShardedBucket) -> None:
        time.sleep(seconds)
        gather(bucket)

    zero._gather = late
    run = built(configured(settings, world_size=2))
    train_step(run)
    report, _ = _validations(run)
    assert report is not None
    return report.loss


def test_validation_waits_for_the_weights(corpus: list[str]) -> None:
    """The head's too: without the MTP module its pass has another place in the stage than in training."""
    settings = [*corpus, *SETTINGS, "model.mtp_depth=1", "precision=fp32", "parallel.ep=2", "validation.every=1",
                "validation.samples=4", "optimizer.schedule.peak=0.1"]  # fmt: skip
    at_once, late = (run_ranks(validated, 2, settings, seconds) for seconds in (0.0, 0.1))
    assert at_once == late


def mirrored(settings: list[str]) -> bool:
    """Whether this rank's weights are, after every one of 20 steps, those of its mirror image."""
    run = built(configured(settings, world_size=2))
    for _ in range(20):
        train_step(run)
        flat = torch.cat([weight.flatten().float() for weight in weights_of(run).values()])
        both = [torch.empty_like(flat) for _ in range(2)]
        torch.distributed.all_gather(both, flat)
        if not torch.equal(*both):
            return False
    return True


def test_both_ranks_of_a_mirrored_stage_hold_one_stage_for_twenty_steps(corpus: list[str]) -> None:
    settings = [*corpus, *SETTINGS, *FEW, *DUALPIPE, "precision=fp8", "steps=20", "model.num_layers=2"]
    assert run_ranks(mirrored, 2, settings) == [True, True]


@pytest.mark.parametrize("layout", [(), ("parallel.schedule=dualpipev",), ("parallel.schedule=zb1p",)])
def test_gradients_are_final_when_they_are_said_to_be(
    corpus: list[str], layout: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every parameter belongs to a pass, and none changes behind the last weight gradient of all its passes."""
    run = built(configured(corpus, *SETTINGS, *layout, "precision=bf16"))
    places = {(s.index, i): fed for s in run.stages for i, fed in enumerate(pass_parameters(run.model, s))}
    assert {id(p) for fed in places.values() for p in fed} == {id(p) for p in run.model.parameters()}
    waiting = {
        p: {place for place, fed in places.items() if any(p is one for one in fed)} for p in run.model.parameters()
    }
    final: dict[Any, Tensor] = {}

    class Recorder:
        def begin(self, schedule: Any) -> None: ...
        def wait_weights(self) -> None: ...
        def before_forward(self, stage: int, position: int) -> None: ...

        def after_last_wgrad(self, stage: int, position: int) -> None:
            for parameter, left in waiting.items():
                left.discard((stage, position))
                if not left and parameter not in final:
                    final[parameter] = main_grad_of(parameter).clone()

        def finish(self) -> Tensor:
            assert not any(waiting.values())
            for parameter, grad in final.items():
                assert grad.any() and torch.equal(grad, main_grad_of(parameter))
            return torch.zeros((), dtype=torch.float64)

    run.zero = Recorder()  # type: ignore[assignment]
    train_step(run)
    assert len(final) == len(waiting)


def remembered(settings: list[str], world_size: int) -> tuple[dict[str, float], dict[str, int]]:
    run = built(configured(settings, world_size=world_size))
    expected = expected_bytes(run.model, run.config.optimizer, replicas_of(run.config))
    return expected, measured_bytes(run.model, run.optimizer)


@pytest.mark.parametrize("of", [("precision=fp32",), ("precision=fp8",), ("precision=fp8", "optimizer=muon")])
@pytest.mark.parametrize(("world_size", "layout"), [(1, ()), *LAYOUTS])
def test_memory_is_what_the_formula_says(
    corpus: list[str], of: tuple[str, ...], world_size: int, layout: tuple[str, ...]
) -> None:
    settings = [*corpus, *SETTINGS, *layout, *of]
    answers = [remembered(settings, 1)] if world_size == 1 else run_ranks(remembered, world_size, settings, world_size)
    total: dict[str, list[float]] = {}
    for expected, measured in answers:
        assert expected.keys() == measured.keys()
        for kind, size in expected.items():
            if "optimizer=muon" not in of:  # whole matrices are no even share of a model as small as this
                assert measured[kind] == pytest.approx(size, rel=0.01), kind
            total[kind] = [a + b for a, b in zip(total.get(kind, [0.0, 0.0]), (size, measured[kind]), strict=True)]
        assert (measured["masters"] == 0) == ("precision=fp32" in of) and measured["moments"] > 0
    for kind, (size, there) in total.items():
        assert there == pytest.approx(size, rel=0.01), kind


def averaged(settings: list[str], world_size: int) -> tuple[float | None, dict[str, Tensor], dict[str, Tensor]]:
    """The loss of the averaged weights after two steps, the weights while it was taken, and those after it."""
    run = built(configured(settings, world_size=world_size))
    for _ in range(2):
        train_step(run)
    assert run.ema is not None
    with averaged_weights(run, run.ema):
        inside = weights_of(run)
    return _validations(run)[1].loss, inside, weights_of(run)  # type: ignore[union-attr]


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_the_average_of_shards_is_validated_as_that_of_whole_weights(corpus: list[str], precision: str) -> None:
    settings = [*corpus, *SETTINGS, *FEW, *DUALPIPE, f"precision={precision}", "ema.decay=0.5", "validation.ema=true",
                "steps=2"]  # fmt: skip
    whole, sharded = (run_ranks(averaged, 2, [*settings, f"optimizer.sharding={how}"], 2) for how in ("none", "zero1"))
    for (loss, inside, after), (their_loss, their_inside, their_after) in zip(whole, sharded, strict=True):
        assert loss == their_loss
        assert [name for name in inside if not torch.equal(inside[name], their_inside[name])] == []
        assert [name for name in after if not torch.equal(after[name], their_after[name])] == []
        assert not any(torch.equal(inside[name], after[name]) for name in inside if inside[name].dim() > 1)
