"""The update against torch's AdamW, what is rounded, decayed and clipped, and the flat buffers behind parameters."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from fp8moe.kernels.quantize import quantize_blocks
from fp8moe.layers.linear import Linear, QuantizedWeight, attach_main_grads, quantize_weights
from fp8moe.layers.moe import GroupedLinear
from fp8moe.layers.recipe import Precision, Recipe
from fp8moe.train.lr import LearningRateConfig, Segment
from fp8moe.train.optimizer import Optimizer, OptimizerConfig
from tests.train.runs import kept

KINDS = ("master", "exp_avg", "exp_avg_sq")
CONFIG = OptimizerConfig(LearningRateConfig(1.0, (Segment("constant", 1.0, 1.0),)), moments="fp32", clip_norm=1e9)


def parameters(dtype: torch.dtype) -> nn.ParameterDict:
    """A matrix, an expert's and a norm, of odd sizes, the expert in between."""
    generator = torch.Generator().manual_seed(0)
    made = nn.ParameterDict()
    for name, shape in (("matrix", (8, 17)), ("experts", (2, 4, 8)), ("norm", (15,)), ("head", (3, 5))):
        made[name] = Parameter(torch.randn(shape, generator=generator).to(dtype))
    made["experts"].is_expert = True  # type: ignore[attr-defined]
    return made


def optimizer_of(model: nn.Module, config: OptimizerConfig = CONFIG) -> Optimizer:
    return Optimizer(model, attach_main_grads(model), config)


def set_grads(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))  # type: ignore[operator]


def test_fp32_equals_torch() -> None:
    ours = parameters(torch.float32)
    theirs = {name: Parameter(p.detach().clone().double()) for name, p in ours.items()}
    decayed = [p for p in theirs.values() if p.ndim > 1]
    oracle = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": [theirs["norm"]], "weight_decay": 0.0}],
        lr=1e-2, betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    optimizer = optimizer_of(ours)
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
    optimizer = optimizer_of(ours, replace(CONFIG, moments="bf16"))
    before = {name: kinds["master"].clone() for name, kinds in kept(optimizer).items()}
    for step in range(20):
        set_grads(ours, step)
        optimizer.step(1e-4, grad_norm=1.0)
    for name, kinds in kept(optimizer).items():
        master = kinds["master"]
        assert [kinds[kind].dtype for kind in KINDS] == [torch.float32, torch.bfloat16, torch.bfloat16]
        assert not torch.equal(master, before[name])
        assert torch.equal(ours[name], master.bfloat16())
        # Steps far below BF16's resolution must add up in the master.
        assert (master.bfloat16().float() != master).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_parameters_become_views_and_keep_what_they_were(dtype: torch.dtype) -> None:
    ours, before = parameters(dtype), parameters(dtype)
    same = dict(ours.items())
    optimizer = optimizer_of(ours)
    for name, parameter in ours.named_parameters():
        master, exp_avg, exp_avg_sq = (kept(optimizer)[name][kind] for kind in KINDS)
        assert parameter is same[name] and torch.equal(parameter, before[name])
        assert torch.equal(master, before[name].float()) and not exp_avg.any() and not exp_avg_sq.any()
        assert (master.data_ptr() == parameter.data_ptr()) == (dtype is torch.float32)
    dense = [ours[name] for name in ("matrix", "norm", "head")]
    assert [p.storage_offset() for p in dense] == [0, 8 * 17, 8 * 17 + 15]
    assert len({p.untyped_storage().data_ptr() for p in dense}) == 1
    with torch.no_grad():
        ours["norm"].fill_(3)
    assert (ours["norm"] == 3).all() and torch.equal(ours["head"], before["head"])


def test_a_parameter_that_stays_fp32_is_its_own_master_among_bf16_ones() -> None:
    ours = parameters(torch.bfloat16)
    ours["norm"] = Parameter(torch.ones(15))
    optimizer = optimizer_of(ours)
    set_grads(ours, 0)
    optimizer.step(1e-2, grad_norm=1.0)
    assert ours["norm"].dtype is torch.float32 and torch.equal(ours["norm"], kept(optimizer)["norm"]["master"])
    assert not (ours["norm"] == 1).any()
    assert torch.equal(ours["head"], kept(optimizer)["head"]["master"].bfloat16())


def test_loaded_masters_are_rounded_into_the_parameters() -> None:
    ours = parameters(torch.bfloat16)
    optimizer = optimizer_of(ours)
    for kinds in kept(optimizer).values():
        kinds["master"].fill_(1 + 2**-12)
    optimizer.write_parameters()
    assert all((parameter == 1).all() for parameter in ours.values())


def test_main_grads_of_another_model_are_refused() -> None:
    ours, other = parameters(torch.bfloat16), parameters(torch.bfloat16)
    attach_main_grads(ours)
    del other["matrix"]
    with pytest.raises(AssertionError, match="of another model"):
        Optimizer(ours, attach_main_grads(other), CONFIG)


class Quantized(nn.Module):
    """FP8 weights of every kind, between parameters without blocks."""

    def __init__(self) -> None:
        super().__init__()
        fp8 = Recipe(Precision.FP8)
        self.norm = Parameter(torch.ones(13, dtype=torch.bfloat16))
        self.wide = Linear(144, 272, fp8)
        self.experts = GroupedLinear(3, 32, 144, fp8)
        self.head = Linear(16, 48, fp8.unquantized)
        self.last = Linear(128, 128, fp8)
        for index, parameter in enumerate(self.parameters()):
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(index))


def test_fp8_blocks_are_written_in_the_same_update(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, plain = Quantized(), Quantized()
    for module in plain.modules():
        if isinstance(module, QuantizedWeight):
            module.recipe = Recipe(Precision.BF16)
    quantize_weights(ours)
    one, other = (optimizer_of(model, replace(CONFIG, moments="bf16")) for model in (ours, plain))
    at = [module.blocks.data.data_ptr() for module in (ours.wide, ours.experts, ours.last)]
    for step in range(3):
        for model, optimizer in ((ours, one), (plain, other)):
            set_grads(model, step)
            optimizer.step(1e-2, grad_norm=1.0)
    for name, kinds in kept(one).items():
        assert torch.equal(ours.get_parameter(name), plain.get_parameter(name)), name
        assert all(torch.equal(tensor, kept(other)[name][kind]) for kind, tensor in kinds.items()), name
    for module, where in zip((ours.wide, ours.experts, ours.last), at, strict=True):
        assert module.blocks.data.data_ptr() == where, "written in place"
        for q, expected in zip(
            (module.blocks, module.transposed_blocks), quantize_blocks(module.weight.detach()), strict=True
        ):
            assert torch.equal(q.data.view(torch.uint8), expected.data.view(torch.uint8))
            assert torch.equal(q.scale, expected.scale)


def test_an_update_before_weights_were_quantized_is_refused() -> None:
    ours = Quantized()
    optimizer = optimizer_of(ours)
    with pytest.raises(AssertionError, match="quantize_weights"):
        optimizer.step(1e-2, grad_norm=1.0)


def test_clipping_scales_by_the_global_norm() -> None:
    clipped, scaled = parameters(torch.float32), parameters(torch.float32)
    # Adam forgets scale at the first step, so a large eps makes the clip visible.
    one, other = (optimizer_of(p, replace(CONFIG, eps=1.0, clip_norm=2.0)) for p in (clipped, scaled))
    set_grads(clipped, 0)
    set_grads(scaled, 0)
    for parameter in scaled.values():
        parameter.main_grad /= 4.0
    one.step(1e-1, grad_norm=8.0)
    other.step(1e-1, grad_norm=2.0 - 1e-6)
    for name in clipped:
        assert torch.allclose(clipped[name], scaled[name], atol=1e-6)
    assert not torch.allclose(clipped["matrix"], parameters(torch.float32)["matrix"], atol=1e-3)


def test_a_norm_below_the_bound_scales_nothing() -> None:
    updated = []
    for clip_norm in (2.0, 4.0):
        ours = parameters(torch.float32)
        optimizer = optimizer_of(ours, replace(CONFIG, eps=1.0, clip_norm=clip_norm))
        set_grads(ours, 0)
        optimizer.step(1e-1, grad_norm=0.5)
        updated.append(ours)
    assert all(torch.equal(updated[0][name], updated[1][name]) for name in updated[0])


def test_a_checkpoint_gets_master_and_both_moments_of_each() -> None:
    ours = parameters(torch.bfloat16)
    optimizer = optimizer_of(ours)
    assert list(optimizer.held) == [name for name, _ in ours.named_parameters()]
    for name, (one,) in optimizer.held.items():
        assert one.parameter is ours[name] and one.first == 0 and set(one.tensors) == set(KINDS)
        assert all(tensor.shape == (ours[name].numel(),) for tensor in one.tensors.values())


def test_only_matrices_decay() -> None:
    ours = parameters(torch.float32)
    before = {name: parameter.detach().clone() for name, parameter in ours.items()}
    optimizer_of(ours, replace(CONFIG, weight_decay=0.5)).step(0.1, grad_norm=0.0)
    assert torch.equal(ours["norm"], before["norm"])
    for name in ("matrix", "experts", "head"):
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
