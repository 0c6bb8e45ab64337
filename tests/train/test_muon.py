"""Muon against torch's, matrix by matrix: fused weights, experts, decay, clipping; and which parameters it updates."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim._muon import _zeropower_via_newtonschulz as torch_newton_schulz

from fp8moe.cli.compose import compose
from fp8moe.kernels.quantize import quantize_blocks
from fp8moe.layers.attention.mla import MlaConfig
from fp8moe.layers.dispatch import LocalDispatcher
from fp8moe.layers.linear import Linear, Matrix, attach_main_grads, is_expert, matrices, quantize_weights
from fp8moe.layers.mlp import Mlp
from fp8moe.layers.moe import Experts, GroupedLinear
from fp8moe.layers.norm import RMSNorm
from fp8moe.layers.recipe import Precision, Recipe
from fp8moe.model.transformer import Transformer, init_weights
from fp8moe.train.lr import LearningRateConfig, Segment
from fp8moe.train.optimizer import AdamW, Muon, OptimizerConfig, muon_step
from fp8moe.train.optimizer.muon_step import COEFFICIENTS, EPS, newton_schulz
from fp8moe.train.step import train_step
from tests.train.runs import SMALL, built, configured

NAN = float("nan")
CONFIG = OptimizerConfig(
    LearningRateConfig(1.0, (Segment("constant", 1.0, 1.0),)), kind="muon", moments="fp32", clip_norm=1e9
)
SHAPES = [(8, 17), (17, 8), (8, 17), (1, 5), (6, 6), (8, 17)]  # wide, tall, a row, square; three of one shape


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def placed(shapes: Sequence[tuple[int, int]]) -> tuple[list[Matrix], int]:
    """Matrices of these shapes in a flat buffer, values of others before, between some of them and after."""
    found, start = [], 3
    for i, (n, k) in enumerate(shapes):
        found.append(Matrix(start, start + n * k, n, k))
        start += n * k + (2 if i % 2 else 0)
    return found, start + 1


def flat(found: list[Matrix], size: int, values: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of the matrices in a buffer that is NaN elsewhere."""
    buffer = torch.full((size,), NAN, dtype=dtype)
    for matrix, value in zip(found, values, strict=True):
        buffer[matrix.start : matrix.stop] = value.flatten()
    return buffer


def oracle(weights: Sequence[Tensor], **settings: Any) -> tuple[list[Parameter], torch.optim.Optimizer]:
    parameters = [Parameter(weight.detach().clone()) for weight in weights]
    return parameters, torch.optim.Muon(parameters, momentum=settings.pop("momentum", 0.95), **settings)


def take_step(parameters: list[Parameter], optimizer: torch.optim.Optimizer, grads: Sequence[Tensor]) -> None:
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad.clone()
    optimizer.step()


@pytest.mark.parametrize("shape", [(3, 8, 17), (2, 40, 24), (4, 1, 7), (2, 96, 96), (1, 33, 65)])
def test_newton_schulz_of_each_is_torchs(shape: tuple[int, int, int]) -> None:
    x = random(*shape, seed=0) * torch.tensor([1e-3, 1.0, 50.0, 2.0])[: shape[0], None, None]
    found = newton_schulz(x, 5)
    assert found.dtype is torch.bfloat16 and not x.isnan().any()
    for one, matrix in zip(found, x, strict=True):
        assert torch.equal(one, torch_newton_schulz(matrix, COEFFICIENTS, 5, EPS))
        # Independently of it: the singular vectors stay, the singular values come near 1.
        u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        inside = u.mT @ one.double() @ vh.mT
        values = inside.diagonal()[s > 0.1 * s[0]]
        assert values.min() > 0.6 and values.max() < 1.3
        assert (inside - inside.diagonal().diag()).abs().max() < 0.1


def test_a_matrix_of_zeros_stays_zero() -> None:
    found = newton_schulz(torch.stack([torch.zeros(4, 6), random(4, 6, seed=0)]), 5)
    assert not found[0].any() and found[1].any()


def test_on_a_cpu_without_bf16_products_operands_are_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    x = random(3, 24, 40, seed=0)
    expected = newton_schulz(x, 5)
    monkeypatch.setattr("fp8moe.layers.linear._CPU_MULTIPLIES_BF16", False)
    monkeypatch.setattr(torch, "baddbmm", only_fp32(torch.baddbmm))
    found = newton_schulz(x, 5)
    assert found.dtype is torch.bfloat16
    assert (found.float() - expected.float()).abs().max() < 0.02, "sums associate otherwise"


def only_fp32(op: Any) -> Any:
    def checked(*operands: Tensor, **options: Any) -> Tensor:
        assert {t.dtype for t in operands} == {torch.float32}
        return op(*operands, **options)

    return checked


@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
@pytest.mark.parametrize(
    ("nesterov", "batch_values"), [(True, 1 << 24), (False, 1 << 24), (True, 2 * 8 * 17), (True, 1)]
)
def test_steps_equal_torchs_to_the_bit(
    adjust: Any, nesterov: bool, batch_values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fp8moe.train.optimizer.muon_step.batch_values", lambda device: batch_values)
    found, size = placed(SHAPES)
    weights = [random(n, k, seed=i) for i, (n, k) in enumerate(SHAPES)]
    settings: dict[str, Any] = dict(lr=0.03, weight_decay=0.2, nesterov=nesterov, ns_steps=4)
    parameters, optimizer = oracle(weights, momentum=0.9, adjust_lr_fn=adjust, **settings)
    master, momentum = flat(found, size, weights), flat(found, size, [torch.zeros_like(w) for w in weights])
    for step in range(4):
        grads = [random(n, k, seed=100 * step + i) for i, (n, k) in enumerate(SHAPES)]
        grad = flat(found, size, grads)
        before = grad.clone()
        muon_step.muon_step(master, grad, momentum, None, found, momentum_beta=0.9, adjust=adjust, **settings)
        take_step(parameters, optimizer, grads)
        assert torch.equal(grad.nan_to_num(9.0), before.nan_to_num(9.0)), "only read"
    buffers = [optimizer.state[p]["momentum_buffer"] for p in parameters]
    for ours, theirs in ((master, flat(found, size, parameters)), (momentum, flat(found, size, buffers))):
        assert torch.equal(ours.nan_to_num(9.0), theirs.nan_to_num(9.0)), "and nothing between the matrices changed"


def test_clipping_multiplies_the_gradient() -> None:
    found, size = placed(SHAPES)
    weights, grads = ([random(n, k, seed=s + i) for i, (n, k) in enumerate(SHAPES)] for s in (0, 50))
    parameters, optimizer = oracle(weights, lr=0.03, adjust_lr_fn="match_rms_adamw")
    master, momentum = flat(found, size, weights), flat(found, size, [torch.zeros_like(w) for w in weights])
    for scale in (0.25, 0.6):  # one alone would be lost in the normalisation
        muon_step.muon_step(
            master, flat(found, size, grads), momentum, None, found, lr=0.03, grad_scale=torch.tensor(scale)
        )
        take_step(parameters, optimizer, [grad * torch.tensor(scale) for grad in grads])
    assert torch.equal(master.nan_to_num(9.0), flat(found, size, parameters).nan_to_num(9.0))


def test_bf16_momentum_is_rounded_after_the_update_and_weights_with_it() -> None:
    found, size = placed([(8, 17), (12, 5)])
    weights = [random(m.n, m.k, seed=m.n) for m in found]
    master, weight = flat(found, size, weights), torch.full((size,), NAN, dtype=torch.bfloat16)
    momentum = flat(found, size, [torch.zeros_like(w) for w in weights], torch.bfloat16)
    kept = [torch.zeros_like(w) for w in weights]
    for step in range(3):
        grads = [random(m.n, m.k, seed=step) for m in found]
        muon_step.muon_step(master, flat(found, size, grads), momentum, weight, found, lr=0.03, weight_decay=0.0)
        for i, (matrix, grad) in enumerate(zip(found, grads, strict=True)):
            average = kept[i] + 0.05 * (grad - kept[i])
            direction = torch_newton_schulz(0.05 * grad + 0.95 * average, COEFFICIENTS, 5, EPS)
            weights[i] = weights[i] - 0.03 * 0.2 * max(matrix.n, matrix.k) ** 0.5 * direction
            kept[i] = average.bfloat16().float()
    # An association of sums can move a value over a rounding of BF16 and one step of the iteration with it.
    assert (master - flat(found, size, weights)).abs().nan_to_num().max() < 1e-3
    assert (momentum.float() - flat(found, size, kept)).abs().nan_to_num().max() < 2**-8
    assert torch.equal(weight.nan_to_num(9.0), master.bfloat16().nan_to_num(9.0))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"master": torch.zeros(12).double()}, r"must be FP32, got torch.float64 and torch.float32: keep"),
        ({"momentum": torch.zeros(12).half()}, "momentum must be BF16 or FP32, got torch.float16: cast it"),
        ({"weight": torch.zeros(12)}, "weight must be BF16, got torch.float32: an FP32 weight is its own master"),
        ({"grad": torch.zeros(3, 4)}, r"must be contiguous \[n\], got \[\[12\], \[3, 4\], \[12\]\]: flatten"),
        ({"matrices": [Matrix(4, 16, 3, 4)]}, r"\[3, 4\] has 12 values .* within the 12 of the buffer, got \[4, 16\)"),
        ({"matrices": [Matrix(0, 10, 3, 4)]}, r"\[3, 4\] has 12 values .* got \[0, 10\)"),
    ],
)
def test_what_can_not_be_updated(change: dict[str, Any], says: str) -> None:
    given: dict[str, Any] = {name: torch.zeros(12) for name in ("master", "grad", "momentum")}
    given |= {"weight": None, "matrices": [Matrix(0, 12, 3, 4)]}
    with pytest.raises(ValueError, match=says):
        muon_step.muon_step(**{**given, **change}, lr=1.0)


FP32, FP8 = Recipe(Precision.FP32), Recipe(Precision.FP8)


def test_matrices_of_a_weight() -> None:
    assert matrices(Linear(5, 3, FP32).weight) == [(0, 15, 3, 5)]
    assert matrices(GroupedLinear(2, 5, 3, FP32).weight) == [(0, 15, 3, 5), (15, 30, 3, 5)]
    assert matrices(Mlp(5, 3, FP32).gate_up.weight) == [(0, 15, 3, 5), (15, 30, 3, 5)]
    assert matrices(Mlp(5, 3, FP32).down.weight) == [(0, 15, 5, 3)]
    assert matrices(Experts(3, 5, 2, FP32).gate_up.weight) == [(10 * i, 10 * i + 10, 2, 5) for i in range(6)]
    assert matrices(RMSNorm(4, FP32, eps=1e-6).weight) == [] == matrices(Parameter(torch.ones(3, 3)))
    mla = MlaConfig(num_heads=2, kv_lora_rank=8, nope_dim=4, rope_dim=2, v_dim=4, q_lora_rank=6)
    layer = mla.build(16, FP32, norm_eps=1e-6)
    assert matrices(layer.qkv_a.weight) == [(0, 96, 6, 16), (96, 256, 10, 16)]
    assert matrices(layer.kv_b.weight) == [(0, 128, 16, 8)], "heads are not apart"
    plain = replace(mla, q_lora_rank=0).build(16, FP32, norm_eps=1e-6)
    assert matrices(plain.qkv_a.weight) == [(0, 192, 12, 16), (192, 352, 10, 16)]
    wrong = Linear(5, 3, FP32, matrix_rows=(2, 2))
    with pytest.raises(ValueError, match=r"matrix_rows=\(2, 2\) have 4 rows and the weight \[3, 5\] has 3"):
        matrices(wrong.weight)


class Layers(nn.Module):
    """Weights of every kind, with norms and a gate between them."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.first_norm = RMSNorm(16, recipe, eps=1e-6)
        self.mlp = Mlp(16, 32, recipe)
        self.gate = Parameter(torch.empty(4, 16, dtype=recipe.dtype))
        self.experts = Experts(3, 16, 32, recipe)
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
    optimizer = Muon(ours, attach_main_grads(ours), config)
    other = AdamW(adam, attach_main_grads(adam), replace(config, kind="adamw"))
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
    optimizer = Muon(ours, attach_main_grads(ours), replace(CONFIG, moments="bf16"))
    set_grads(ours, 0)
    optimizer.step(1e-2, 1.0)
    given = {name: (parameter, tensor) for name, parameter, tensor in optimizer.tensors()}
    named = dict(ours.named_parameters())
    rest = [name for name in named if name not in MATRICES]
    assert set(given) == (
        {f"{kind}.{name}" for name in MATRICES for kind in ("master", "momentum")}
        | {f"{kind}.{name}" for name in rest for kind in ("master", "exp_avg", "exp_avg_sq")}
    )
    for name, (parameter, tensor) in given.items():
        kind, _, own = name.partition(".")
        assert parameter is named[own] and tensor.shape == parameter.shape and tensor.any()
        assert tensor.dtype is (torch.float32 if kind == "master" else torch.bfloat16)
        assert getattr(optimizer.states[own], kind) is tensor
    for name, parameter in named.items():
        assert torch.equal(parameter, optimizer.states[name].master.bfloat16()), name
    for _, _, tensor in optimizer.tensors():
        tensor.fill_(1 + 2**-12)
    optimizer.write_parameters()
    assert all((parameter == 1).all() for parameter in named.values())
    optimizer.updates = 7
    assert optimizer.updates == 7


def test_fp8_blocks_are_those_of_the_new_weights() -> None:
    ours, plain = Layers(FP8), Layers(Recipe(Precision.BF16))
    one, other = (Muon(model, attach_main_grads(model), CONFIG) for model in (ours, plain))
    for step in range(2):
        for model, optimizer in ((ours, one), (plain, other)):
            set_grads(model, step)
            optimizer.step(1e-2, 1.0)
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, plain.get_parameter(name)), name
    for module in (ours.mlp.gate_up, ours.mlp.down, ours.experts.gate_up, ours.experts.down, ours.wide, ours.tall):
        for kept, expected in zip(
            (module.blocks, module.transposed_blocks), quantize_blocks(module.weight.detach()), strict=True
        ):
            assert torch.equal(kept.data.view(torch.uint8), expected.data.view(torch.uint8))
            assert torch.equal(kept.scale, expected.scale)


def test_which_parameters_of_the_model_are_muons() -> None:
    config = compose([*SMALL, "model.mtp_depth=1"]).config.model
    model = Transformer(config, FP32, LocalDispatcher(config.experts.num_experts))
    init_weights(model, 0)
    before = copy.deepcopy({name: p.detach() for name, p in model.named_parameters()})
    optimizer = Muon(model, model.main_grads, CONFIG)
    found = {name for name, state in optimizer.states.items() if hasattr(state, "momentum")}
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
        ({"ns_steps": 0}, "optimizer.ns_steps=0 must be at least 1: use 5"),
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
    run = built(configured([*corpus, "optimizer=muon", "precision=bf16", "steps=12"]))
    assert isinstance(run.optimizer, Muon)
    losses = [train_step(run).loss for _ in range(12)]
    assert losses[-1] < losses[0] - 0.5, losses
