"""The update against torch's AdamW, and what is rounded, decayed and clipped."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import Parameter

from fp8moe.train.lr import LearningRateConfig, Segment
from fp8moe.train.optimizer import AdamW, OptimizerConfig

CONFIG = OptimizerConfig(LearningRateConfig(1.0, (Segment("constant", 1.0, 1.0),)), moments="fp32", clip_norm=1e9)


def parameters(dtype: torch.dtype) -> dict[str, Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, shape in (("matrix", (8, 16)), ("experts", (2, 4, 8)), ("norm", (16,))):
        made[name] = Parameter(torch.randn(shape, generator=generator).to(dtype))
        made[name].main_grad = torch.zeros(shape)
    return made


def set_grads(ours: dict[str, Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in ours.values():
        parameter.main_grad = torch.randn(parameter.shape, generator=generator)


def test_fp32_equals_torch() -> None:
    ours = parameters(torch.float32)
    theirs = {name: Parameter(p.detach().clone().double()) for name, p in ours.items()}
    decayed = [p for p in theirs.values() if p.ndim > 1]
    oracle = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": [theirs["norm"]], "weight_decay": 0.0}],
        lr=1e-2, betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    optimizer = AdamW(ours, CONFIG)
    for step in range(5):
        set_grads(ours, step)
        for name, parameter in theirs.items():
            parameter.grad = ours[name].main_grad.double()
        optimizer.step(1e-2, grad_norm=1.0)
        oracle.step()
    assert optimizer.updates == 5
    for name in ours:
        assert torch.allclose(ours[name].double(), theirs[name], atol=1e-6), name


def test_bf16_parameters_are_the_rounded_masters() -> None:
    ours = parameters(torch.bfloat16)
    optimizer = AdamW(ours, replace(CONFIG, moments="bf16"))
    before = {name: state.master.clone() for name, state in optimizer.states.items()}
    for step in range(20):
        set_grads(ours, step)
        optimizer.step(1e-4, grad_norm=1.0)
    for name, state in optimizer.states.items():
        assert state.master.dtype == torch.float32 and state.exp_avg.dtype == state.exp_avg_sq.dtype == torch.bfloat16
        assert not torch.equal(state.master, before[name])
        assert torch.equal(ours[name], state.master.bfloat16())
        # Steps far below BF16's resolution must add up in the master.
        assert (state.master.bfloat16().float() != state.master).any()


def test_clipping_scales_by_the_global_norm() -> None:
    clipped, scaled = parameters(torch.float32), parameters(torch.float32)
    set_grads(clipped, 0)
    set_grads(scaled, 0)
    for parameter in scaled.values():
        parameter.main_grad /= 4.0
    # Adam forgets scale at the first step, so a large eps makes the clip visible.
    one, other = (AdamW(p, replace(CONFIG, eps=1.0, clip_norm=2.0)) for p in (clipped, scaled))
    one.step(1e-1, grad_norm=8.0)
    other.step(1e-1, grad_norm=2.0 - 1e-6)
    for name in clipped:
        assert torch.allclose(clipped[name], scaled[name], atol=1e-6)
    assert not torch.allclose(clipped["matrix"], parameters(torch.float32)["matrix"], atol=1e-3)


def test_a_norm_below_the_bound_scales_nothing() -> None:
    updated = []
    for clip_norm in (2.0, 4.0):
        ours = parameters(torch.float32)
        set_grads(ours, 0)
        AdamW(ours, replace(CONFIG, eps=1.0, clip_norm=clip_norm)).step(1e-1, grad_norm=0.5)
        updated.append(ours)
    assert all(torch.equal(updated[0][name], updated[1][name]) for name in updated[0])


def test_a_checkpoint_gets_master_and_both_moments_of_each() -> None:
    ours = parameters(torch.bfloat16)
    optimizer = AdamW(ours, CONFIG)
    given = {name: (parameter, tensor) for name, parameter, tensor in optimizer.tensors()}
    kinds = ("master", "exp_avg", "exp_avg_sq")
    assert list(given) == [f"{kind}.{name}" for name in ours for kind in kinds]
    for name, state in optimizer.states.items():
        for kind in kinds:
            assert given[f"{kind}.{name}"][0] is ours[name] and given[f"{kind}.{name}"][1] is getattr(state, kind)


def test_only_matrices_decay() -> None:
    ours = parameters(torch.float32)
    before = {name: parameter.detach().clone() for name, parameter in ours.items()}
    AdamW(ours, replace(CONFIG, weight_decay=0.5)).step(0.1, grad_norm=0.0)
    assert torch.equal(ours["norm"], before["norm"])
    for name in ("matrix", "experts"):
        assert torch.allclose(ours[name], before[name] * (1 - 0.1 * 0.5))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"beta1": 1.0}, "optimizer.beta1=1.0 must be at least 0 and below 1: DeepSeek-V3 used 0.9"),
        ({"beta2": -0.1}, "optimizer.beta2=-0.1"),
        ({"eps": 0.0}, "optimizer.eps=0.0"),
        ({"clip_norm": 0.0}, "optimizer.clip_norm=0.0"),
        ({"weight_decay": -0.1}, "optimizer.weight_decay=-0.1"),
    ],
)
def test_impossible_settings(change: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        replace(CONFIG, **change)
    replace(CONFIG, beta1=0.0, beta2=0.0, weight_decay=0.0)
