"""DeepSpeed's ZeRO-1 beside the project's AdamW, step by step on real processes; what it can't do is refused.

The comparisons need the package: python -m pip install -e ".[deepspeed]", then pytest of this file.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from fp8moe.errors import ConfigError
from fp8moe.layers.linear import attach_main_grads, is_expert
from fp8moe.parallel.mesh import build_mesh
from fp8moe.train.lr import LearningRateConfig, Segment
from fp8moe.train.optimizer import DeepSpeedAdamW, Optimizer, OptimizerConfig
from fp8moe.train.optimizer import deepspeed as adapter
from fp8moe.train.run_state import save_checkpoint
from fp8moe.train.step import train_step
from tests.parallel.ranks import run_ranks
from tests.train.runs import built, configured, kept, weights_of
from tests.train.test_optimizer import parameters

CONFIG = OptimizerConfig(LearningRateConfig(1.0, (Segment("constant", 1.0, 1.0),)), moments="fp32", clip_norm=1e9)
SETTINGS = ("optimizer.moments=fp32", "checkpoint.background=false")
DEEPSPEED, UNSHARDED = "optimizer.sharding=deepspeed", "optimizer.sharding=none"


@pytest.fixture
def package() -> Iterator[None]:
    """DeepSpeed, imported once before ranks are forked; the test is skipped without it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        pytest.importorskip("deepspeed", reason='deepspeed is not installed: pip install "fp8moe[deepspeed]" runs this')
        yield


@dataclasses.dataclass
class Trained:
    """(loss, gradient norm) of every step; weights, and the state's tensors where they are whole, after the last."""

    numbers: list[tuple[float, float]]
    weights: dict[str, Tensor]
    state: dict[str, Tensor]


def train(settings: list[str], steps: int, save: bool = False) -> Trained:
    """Train up to step number `steps` on two processes, from the checkpoint that `settings` may name."""
    run = built(configured(settings, world_size=2))
    numbers = []
    while run.step < steps:
        report = train_step(run)
        numbers.append((report.loss, report.grad_norm))
    if save:
        save_checkpoint(run)
    weights, state = weights_of(run), state_of(run.optimizer) if run.zero is None else {}
    for name, parameter in run.model.named_parameters() if state else ():  # what forward reads is the master rounded
        assert torch.equal(parameter.detach(), state[f"master.{name}"].to(parameter.dtype)) and parameter.grad is None
    return Trained(numbers, weights, state)


def state_of(optimizer: Optimizer | DeepSpeedAdamW) -> dict[str, Tensor]:
    """Copies of masters and moments, which no rank shares out, by kind and name."""
    return {f"{kind}.{name}": t.clone() for name, kinds in kept(optimizer).items() for kind, t in kinds.items()}


def distance(ours: Trained, theirs: Trained, kind: str = "") -> float:
    """The largest relative L2 distance of two ranks' tensors of one name."""
    assert ours.state.keys() == theirs.state.keys()
    pairs = [(ours.state[name].double(), theirs.state[name].double()) for name in ours.state if name.startswith(kind)]
    return max(float((a - b).norm() / a.norm().clamp(min=1e-30)) for a, b in pairs)


def train_both(settings: list[str], steps: int) -> list[tuple[Trained, Trained]]:
    """(ours, DeepSpeed's) after one step and after `steps`."""
    return [(train([*settings, UNSHARDED], n), train([*settings, DEEPSPEED], n)) for n in (1, steps)]


# Clipped at every step or at none, two micro-batches a rank; fp8 and bf16 have BF16 weights and FP32 gradients.
@pytest.mark.parametrize(
    ("precision", "ep", "clip_norm", "bound"),
    [("fp32", 1, 0.5, 1e-6), ("fp32", 2, 100.0, 1e-6), ("bf16", 2, 0.5, 2e-3), ("fp8", 1, 100.0, 2e-2)],
)
def test_training_equals_the_unsharded_optimizer(
    package: None, corpus: list[str], precision: str, ep: int, clip_norm: float, bound: float
) -> None:
    settings = [*corpus, *SETTINGS, f"precision={precision}", f"parallel.ep={ep}", f"optimizer.clip_norm={clip_norm}"]
    for first, last in run_ranks(train_both, 2, settings, 5):
        # Until weights are first rounded to BF16, every sum is FP32 in any precision.
        assert first[1].numbers[0] == pytest.approx(first[0].numbers[0], rel=1e-6)
        assert distance(*first) < 1e-6
        ours, theirs = last
        assert all((norm > clip_norm) == (clip_norm < 1.0) for _, norm in ours.numbers)
        for step, their_step in zip(ours.numbers, theirs.numbers, strict=True):
            assert their_step == pytest.approx(step, rel=bound)
        assert distance(ours, theirs, "master.") < bound


def update_toy(dtype: torch.dtype, world_size: int, ep: int, clip_norm: float, bucket: int) -> dict[str, Any]:
    """Three updates of the toy, a step that is not finite and left out in between; what an oracle needs to follow."""
    adapter.BUCKET = bucket
    mesh = build_mesh(1, world_size, ep, timeout=timedelta(seconds=60))
    model = parameters(dtype)
    optimizer = DeepSpeedAdamW(model, attach_main_grads(model), dataclasses.replace(CONFIG, clip_norm=clip_norm), mesh)
    torch.stack([parameter.float().sum() for parameter in model.values()]).sum().backward()
    assert not optimizer._zero.ready_for_gradients, "DeepSpeed's hooks took part in a backward"
    norms, grads = [], []
    for step in range(4):
        generator = torch.Generator().manual_seed(10 * step + mesh.rank)
        for parameter in model.values():
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))  # type: ignore[operator]
        grads.append({name: p.main_grad.clone() for name, p in model.items()})  # type: ignore[operator]
        if step == 1 and mesh.rank == 1:
            model["experts"].main_grad[0, 0, 0] = math.nan  # type: ignore[index]
        norms.append(optimizer.reduce())
        if step != 1:
            optimizer.step(1e-2, norms[-1])
    weights = {name: p.detach().clone() for name, p in model.items()}
    state = state_of(optimizer)
    held = sum(moments["exp_avg"].numel() for moments in optimizer._zero.state.values())
    assert optimizer.updates == 3
    return {"norms": norms, "grads": grads, "weights": weights, "state": state, "held": held}


@pytest.mark.parametrize(
    ("world_size", "ep", "dtype", "clip_norm", "bucket"),
    [(2, 2, torch.bfloat16, 1e9, 1 << 20), (3, 1, torch.float32, 3.0, 50), (4, 2, torch.bfloat16, 3.0, 1 << 20)],
)
def test_update_equals_torch_on_summed_gradients(
    package: None, world_size: int, ep: int, dtype: torch.dtype, clip_norm: float, bucket: int
) -> None:
    ranks = run_ranks(update_toy, world_size, dtype, world_size, ep, clip_norm, bucket)
    kinds = parameters(dtype)
    for rank, found in enumerate(ranks):
        oracle = {name: Parameter(p.detach().double()) for name, p in kinds.items()}
        adamw = torch.optim.AdamW(
            [{"params": [p], "weight_decay": 0.1 if p.ndim > 1 else 0.0} for p in oracle.values()],
            lr=1e-2, betas=(0.9, 0.95), eps=1e-8,
        )  # fmt: skip
        for step in range(4):
            sums = []
            for its_ep in range(ep):  # what each ep rank's replicas sum to; dense parameters are the same on all
                same = [r for r in range(world_size) if r % ep == its_ep]
                sums.append(
                    {
                        name: sum(
                            ranks[r]["grads"][step][name].double()
                            for r in (same if is_expert(p) else range(world_size))
                        )
                        for name, p in kinds.items()
                    }
                )
            if step == 1:
                assert math.isnan(found["norms"][step])
                continue
            squared = sum(g.square().sum() for name, g in sums[0].items() if not is_expert(kinds[name]))
            norm = float((squared + sum(of["experts"].square().sum() for of in sums)) ** 0.5)
            assert found["norms"][step] == pytest.approx(norm, rel=1e-6)
            for name, parameter in oracle.items():
                parameter.grad = sums[rank % ep][name] * min(1.0, clip_norm / norm)
            adamw.step()
        held = sum(p.numel() / (world_size // ep if is_expert(p) else world_size) for p in kinds.values())
        assert held <= found["held"] < held + 3 * 2  # one part of each group, padded to two elements
        for name, parameter in oracle.items():
            master, state = found["state"][f"master.{name}"], adamw.state[parameter]
            assert torch.allclose(master.double(), parameter, atol=1e-6), name
            assert torch.equal(found["weights"][name], master.to(dtype)), name
            for moment in adapter.MOMENTS:
                assert torch.allclose(found["state"][f"{moment}.{name}"].double(), state[moment], atol=1e-6), name


def resume_both(settings: list[str], folder: Path) -> dict[str, Trained]:
    """Four steps of DeepSpeed's; the same saved after two and resumed; each optimizer after the other's two steps."""

    def saved(name: str) -> str:
        return f"resume={folder / name / 'checkpoints' / 'step-2'}"

    theirs = [*settings, DEEPSPEED]
    return {
        "whole": train(theirs, 4),
        "saved": train([*theirs, f"run_dir={folder / 'theirs'}"], 2, save=True),
        "resumed": train([*theirs, saved("theirs")], 4),
        "ours after theirs": train([*settings, saved("theirs")], 3),
        "ours": train([*settings, f"run_dir={folder / 'ours'}"], 2, save=True),
        "theirs after ours": train([*theirs, saved("ours")], 3),
    }


@pytest.mark.parametrize("ep", [1, 2])
def test_resume_changes_no_bit_and_optimizers_and_layouts_resume_each_other(
    package: None, corpus: list[str], tmp_path: Path, ep: int
) -> None:
    settings = [*corpus, *SETTINGS, "precision=bf16"]
    ranks = run_ranks(resume_both, 2, [*settings, f"parallel.ep={ep}"], tmp_path)
    for done in ranks:
        whole, resumed = done["whole"], done["resumed"]
        assert resumed.numbers == whole.numbers[2:]
        for there, here in ((whole.weights, resumed.weights), (whole.state, resumed.state)):
            assert [name for name in there if not torch.equal(there[name], here[name])] == []
        assert done["ours after theirs"].numbers[0] == pytest.approx(whole.numbers[2], rel=1e-6)
        assert done["theirs after ours"].numbers[0] == pytest.approx(whole.numbers[2], rel=1e-3)
    alone = built(configured([*settings, f"resume={tmp_path / 'theirs' / 'checkpoints' / 'step-2'}"]))
    for name, tensor in state_of(alone.optimizer).items():
        parts = [done["saved"].state[name] for done in ranks]
        assert torch.equal(tensor, parts[0] if parts[0].shape == tensor.shape else torch.cat(parts)), name


@pytest.mark.parametrize(
    ("settings", "world_size", "sentence"),
    [
        (["parallel.pp=2"], 4, "needs parallel.pp=1 and parallel.pp=2: use parallel.pp=1"),
        ([], 1, "needs at least 2 data-parallel processes and there is 1: start 2"),
        (
            ["checkpoint.background=true"],
            2,
            "gathers its state for a checkpoint between steps: use checkpoint.background=false",
        ),
        (["ema.decay=0.9"], 2, "keeps masters that are not averaged: use ema.decay=null"),
        (["optimizer.kind=muon"], 2, "needs optimizer.kind=adamw and it is muon: use optimizer.kind=adamw"),
        (["optimizer.moments=bf16"], 2, "needs optimizer.moments=fp32 and it is bf16: use optimizer.moments=fp32"),
    ],
)
def test_what_it_cannot_do_is_refused(corpus: list[str], settings: list[str], world_size: int, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"optimizer.sharding=deepspeed {sentence}"):
        configured([*corpus, *SETTINGS, DEEPSPEED, *settings], world_size=world_size)


def test_without_the_package_it_says_what_to_install(corpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "deepspeed" else found(name))
    with pytest.raises(ConfigError, match=r'not installed: pip install "fp8moe\[deepspeed\]"'):
        configured([*corpus, *SETTINGS, DEEPSPEED], world_size=2)
