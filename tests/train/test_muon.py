"""Muon beside torch's and beside AdamW: fused weights, experts, FP8 blocks, checkpoints, which parameters are its."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from fp8moe.cli.compose import compose
from fp8moe.kernels.quantize import quantize_blocks
from fp8moe.layers.dispatch import LocalDispatcher
from fp8moe.layers.linear import Linear, attach_main_grads, is_expert, matrices, quantize_weights
from fp8moe.layers.mlp import Mlp
from fp8moe.layers.moe import Experts, ExpertsConfig
from fp8moe.layers.norm import RMSNorm
from fp8moe.layers.recipe import Precision, Recipe
from fp8moe.model.transformer import Transformer, init_weights
from fp8moe.train.lr import LearningRateConfig, Segment
from fp8moe.train.optimizer import Optimizer, OptimizerConfig
from fp8moe.train.step import train_step
from tests.train.muon_oracle import oracle, random, take_step
from tests.train.runs import SMALL, built, configured, kept

CONFIG = OptimizerConfig(
    LearningRateConfig(1.0, (Segment("constant", 1.0, 1.0),)), kind="muon", moments="fp32", clip_norm=1e9
)
FP32, FP8 = Recipe(Precision.FP32), Recipe(Precision.FP8)


class Layers(nn.Module):
    """Weights of every kind, with norms and a gate between them."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.first_norm = RMSNorm(16, recipe, eps=1e-6)
        self.mlp = Mlp(16, 32, recipe)
        self.gate = Parameter(torch.empty(4, 16, dtype=recipe.dtype))
        self.experts = Experts(3, 16, ExpertsConfig(3, 32), recipe)
        self.wide, self.tall = Linear(48, 16, recipe), Linear(16, 48, recipe)
        self.head = Linear(16, 80, recipe.unquantized, matrix_rows=())
        for index, parameter in enumerate(self.parameters()):
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(index))
        quantize_weights(self)


def set_grads(model: nn.Module, seed: int) -> None:
    for index, parameter in enumerate(model.parameters()):
        parameter.main_grad.copy_(random(*parameter.shape, seed=100 * seed + index))  # type: ignore[operator]


MATRICES = {  # name -> how many along dimension 0, and rows of each
    "mlp.gate_up.weight": (32, 32), "mlp.down.weight": (16,), "wide.weight": (16,), "tall.weight": (48,),
    "experts.gate_up.weight": (32, 32), "experts.down.weight": (16,),
}  # fmt: skip


def parts_of(name: str, tensor: Tensor) -> list[Tensor]:
    """The matrices of that parameter, as said above."""
    ones = list(tensor) if name.startswith("experts") else [tensor]
    return [part for one in ones for part in one.split(MATRICES[name])]


@pytest.mark.parametrize("clip_norm", [1e9, 0.5])
def test_each_matrix_is_updated_as_torchs_muon_and_the_rest_as_adamw(clip_norm: float) -> None:
    ours, adam = Layers(FP32), Layers(FP32)
    config = replace(CONFIG, clip_norm=clip_norm, muon_beta=0.9, weight_decay=0.3)
    given = {name: [part.clone() for part in parts_of(name, ours.get_parameter(name).detach())] for name in MATRICES}
    optimizer = Optimizer(ours, attach_main_grads(ours), config)
    other = Optimizer(adam, attach_main_grads(adam), replace(config, kind="adamw"))
    oracles = {
        name: oracle(parts, lr=2e-2, momentum=0.9, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
        for name, parts in given.items()
    }
    for step in range(3):
        norm = 2.0 + step
        scale = torch.tensor(min(1.0, clip_norm / (norm + 1e-6)))
        for model in (ours, adam):
            set_grads(model, step)
        for name, (parameters, muon) in oracles.items():
            take_step(parameters, muon, parts_of(name, ours.get_parameter(name).main_grad * scale))  # type: ignore[operator]
        optimizer.step(2e-2, norm)
        other.step(2e-2, norm)
    assert optimizer.updates == 3
    for name, parameter in ours.named_parameters():
        if name in MATRICES:
            for part, expected in zip(parts_of(name, parameter.detach()), oracles[name][0], strict=True):
                assert torch.equal(part, expected.detach()), name
        else:
            assert torch.equal(parameter, adam.get_parameter(name)), name


def test_a_checkpoint_gets_momentum_of_matrices_and_two_moments_of_the_rest() -> None:
    ours = Layers(Recipe(Precision.BF16))
    optimizer = Optimizer(ours, attach_main_grads(ours), replace(CONFIG, moments="bf16"))
    set_grads(ours, 0)
    optimizer.step(1e-2, 1.0)
    assert list(optimizer.held) == [name for name, _ in ours.named_parameters()]
    for name, kinds in kept(optimizer).items():
        assert list(kinds) == ["master", *(["momentum"] if name in MATRICES else ["exp_avg", "exp_avg_sq"])]
        for kind, tensor in kinds.items():
            assert tensor.any() and tensor.dtype is (torch.float32 if kind == "master" else torch.bfloat16)
        assert torch.equal(ours.get_parameter(name), kinds["master"].bfloat16()), name
        kinds["master"].fill_(1 + 2**-12)
    optimizer.write_parameters()
    assert all((parameter == 1).all() for parameter in ours.parameters())


def test_fp8_blocks_are_those_of_the_new_weights() -> None:
    ours, plain = Layers(FP8), Layers(Recipe(Precision.BF16))
    one, other = (Optimizer(model, attach_main_grads(model), CONFIG) for model in (ours, plain))
    for step in range(2):
        for model, optimizer in ((ours, one), (plain, other)):
            set_grads(model, step)
            optimizer.step(1e-2, 1.0)
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, plain.get_parameter(name)), name
    for module in (ours.mlp.gate_up, ours.mlp.down, ours.experts.gate_up, ours.experts.down, ours.wide, ours.tall):
        for made, expected in zip(
            (module.blocks, module.transposed_blocks), quantize_blocks(module.weight.detach()), strict=True
        ):
            assert torch.equal(made.data.view(torch.uint8), expected.data.view(torch.uint8))
            assert torch.equal(made.scale, expected.scale)


def test_which_parameters_of_the_model_are_muons() -> None:
    config = compose([*SMALL, "model.mtp_depth=1"]).config.model
    model = Transformer(config, FP32, LocalDispatcher(config.experts.num_experts))
    init_weights(model, 0)
    before = copy.deepcopy({name: p.detach() for name, p in model.named_parameters()})
    optimizer = Optimizer(model, model.main_grads, CONFIG)
    found = {name for name, kinds in kept(optimizer).items() if "momentum" in kinds}
    of_a_layer = {f"attn.{name}.weight" for name in ("qkv_a", "q_b", "kv_b", "o")}
    of_experts = {f"moe.{name}.{part}.weight" for name in ("experts", "shared") for part in ("gate_up", "down")}
    assert found == (
        {f"blocks.{i}.{name}" for i in range(2) for name in of_a_layer}
        | {f"blocks.0.mlp.{part}.weight" for part in ("gate_up", "down")}
        | {f"blocks.1.{name}" for name in of_experts}
        | {f"mtp.block.{name}" for name in of_a_layer | of_experts}
        | {"mtp.join.weight"}
    )
    rest = {name for name, parameter in model.named_parameters() if parameter.ndim > 1} - found
    assert rest == {"embedding.weight", "head.weight", "blocks.1.moe.router.weight", "mtp.block.moe.router.weight"}
    for name, parameter in model.named_parameters():
        parts = matrices(parameter)
        assert bool(parts) == (name in found) and torch.equal(parameter, before[name])
        if parts:
            assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
            assert parts[-1].stop == parameter.numel() and {part.k for part in parts} == {parameter.shape[-1]}
            fused = 2 if "gate_up" in name or "qkv_a" in name else 1
            assert len(parts) == fused * (len(parameter) if is_expert(parameter) else 1), name


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kind": "sgd"}, "optimizer.kind='sgd' does not exist: use adamw or muon"),
        ({"adjust": "none"}, "optimizer.adjust='none' does not exist: use match_rms_adamw or original"),
        ({"ns_steps": 0}, "optimizer.ns_steps=0 must be at least 1: use 1 or more"),
        ({"muon_beta": 1.0}, "optimizer.muon_beta=1.0 must be at least 0 and below 1: Muon's author used 0.95"),
    ],
)
def test_impossible_settings(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        replace(CONFIG, **change)


def test_the_group_and_the_key_choose_it() -> None:
    adamw, muon = (compose([f"optimizer={name}"]).config.optimizer for name in ("adamw", "muon"))
    assert muon == replace(adamw, kind="muon") and muon.adjust == "match_rms_adamw"
    other = compose(["optimizer=adamw_dsv3", "optimizer.kind=muon", "optimizer.muon_beta=0.9"]).config.optimizer
    assert (other.kind, other.muon_beta, other.schedule.unit) == ("muon", 0.9, "tokens")


def test_training_with_it_lowers_the_loss(corpus: list[str]) -> None:
    run = built(configured([*corpus, "optimizer=muon", "precision=bf16", "steps=12", "optimizer.schedule.peak=5e-3"]))
    assert "momentum" in kept(run.optimizer)["blocks.0.attn.o.weight"]
    losses = [train_step(run).loss for _ in range(12)]
    assert losses[-1] < losses[0] - 1.5, losses
