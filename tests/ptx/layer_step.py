"""One small mixture layer of DeepSeek-V3's structure and one step of it by the phases and functions of training.

Latent attention with both latents, a sigmoid router with groups, a shared expert and six routed ones, of which one gets
no token and the others get different numbers. Sizes are small, since the machine's time is that of the products, and
heads of queries and values are equally wide: a CPU's attention then keeps its output for its backward, as a GPU's does.

`main_grad` starts from values, so that adding is seen, and the empty expert's must keep them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fp8moe.kernels.fp8 import TILE
from fp8moe.layers.attention import MlaConfig, Positions
from fp8moe.layers.dispatch import Announced, LocalDispatcher
from fp8moe.layers.linear import main_grad_of, quantize_weights
from fp8moe.layers.moe import ExpertsConfig
from fp8moe.layers.recipe import FULL_RECOMPUTE, Precision, Recipe
from fp8moe.layers.router import RouterConfig
from fp8moe.model.config import ModelConfig
from fp8moe.model.phases import BalanceLoss, pass_through
from fp8moe.model.transformer import Transformer
from fp8moe.parallel.overlap import deferred_wgrads, run_backward, run_forward, run_wgrads
from fp8moe.profile.spans import Listener, listening, span

SEQUENCES, LENGTH = 2, 64
BALANCE_WEIGHT = 300.0  # of the balance loss in the total: enough for its gradient to count
EMPTY = 4  # the expert whose bias keeps every token away
BIASES = (0.1, -0.1, 0.05, -0.15, -2.0, 1.0)  # of the choice; the last makes up for its group's other expert
CONFIG = ModelConfig(
    vocab_size=16, dim=256, num_layers=1, num_dense_layers=0, dense_hidden=16,
    attention=MlaConfig(
        num_heads=2, q_lora_rank=128, kv_lora_rank=128, nope_dim=32, rope_dim=32, v_dim=64, backend="sdpa"
    ),
    router=RouterConfig(topk=2, num_groups=3, top_groups=2, route_scale=2.5),
    experts=ExpertsConfig(num_experts=len(BIASES), hidden=128, num_shared=1),
)  # fmt: skip
RECIPES = {
    "fp8": Recipe(Precision.FP8, FULL_RECOMPUTE),
    "bf16": Recipe(Precision.BF16, FULL_RECOMPUTE),
}


class Noting(LocalDispatcher):
    """Keeps the experts that were chosen."""

    def announce(self, topk_ids_TK: Tensor) -> Announced:
        self.ids_TK = topk_ids_TK
        return super().announce(topk_ids_TK)


@dataclass(frozen=True)
class Layer:
    """The layer and what goes in: x and the gradient of its output [T, D], BF16, positions, `main_grad` before."""

    model: Transformer
    dispatcher: Noting
    positions: Positions
    x_TD: Tensor
    dy_TD: Tensor
    before: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Stepped:
    """What a step gives; main_grads: what it added to that of each parameter, FP64."""

    ids_TK: Tensor
    loads_E: Tensor
    balance_loss: Tensor
    output_TD: Tensor
    input_gradient_TD: Tensor
    main_grads: dict[str, Tensor]

    def values(self) -> dict[str, Tensor]:
        """The numbers by name, without the choice of experts."""
        named = {
            "balance loss": self.balance_loss, "output": self.output_TD, "input gradient": self.input_gradient_TD,
        }  # fmt: skip
        return named | self.main_grads


def build(kind: str, device: str) -> Layer:
    """The layer of a kind of RECIPES on `device`, its memory as it was found."""
    dispatcher, shape = Noting(CONFIG.experts.num_experts), (SEQUENCES * LENGTH, CONFIG.dim)
    with torch.device(device):
        model = Transformer(CONFIG, RECIPES[kind], dispatcher, embedding=False, head=False)
        positions = model.positions(torch.arange(LENGTH).expand(SEQUENCES, -1))
        x_TD, dy_TD = torch.empty(2, *shape, dtype=torch.bfloat16)
    return Layer(model, dispatcher, positions, x_TD, dy_TD)


def growing(size: int, *, part: int = TILE) -> Tensor:
    """A factor for each of `size` features, the last part's four times the first's; their squares are 1 on average."""
    number = torch.arange(size) // part
    factors = 4.0 ** (number / number[-1].clamp(min=1))
    return factors / factors.square().mean().sqrt()


@torch.no_grad()
def draw(layer: Layer) -> None:
    """Values for everything, the same for each kind; a scale of another tile, row or expert is another number.

    Weights grow from tile to tile both ways and gains fall, so that what they make together is of one size.
    """
    torch.manual_seed(0)
    for name, parameter in layer.model.named_parameters():
        if parameter.ndim == 1:
            parameter.uniform_(0.5, 1.5).div_(growing(len(parameter)))
        else:
            rows, columns = map(growing, parameter.shape[-2:])
            parameter.normal_(std=len(columns) ** -0.5).mul_(rows[:, None] * columns)
        if parameter.ndim == 3:
            parameter.mul_(growing(len(parameter), part=1)[:, None, None])
        layer.before[name] = main_grad_of(parameter).normal_(std=30).clone()
    layer.model.block(0).moe.router.bias_E.copy_(torch.tensor(BIASES))
    for values_TD in (layer.x_TD, layer.dy_TD):
        values_TD.normal_().mul_(growing(len(values_TD), part=1)[:, None])


def step(layer: Layer, listener: Listener) -> Stepped:
    """Cast the weights, then forward, backward and weight gradients, each phase a span that `listener` hears."""
    block, losses = layer.model.block(0), list[Tensor]()
    with listening(listener):
        with span("weights"):
            quantize_weights(layer.model)
        balance = BalanceLoss(BALANCE_WEIGHT, losses.append)
        one = pass_through(block, lambda: layer.x_TD, layer.positions, balance)
        run_forward((one,))
        output_TD = one.output
        one.backward_from(lambda: layer.dy_TD)
        run_backward((one,))
        run_wgrads(deferred_wgrads((one,)))
    added = {
        name: main_grad_of(parameter).double() - layer.before[name].double()
        for name, parameter in layer.model.named_parameters() if name in layer.before
    }  # fmt: skip
    loads_E = block.moe.router.counts_E
    return Stepped(layer.dispatcher.ids_TK, loads_E, losses[0], output_TD, one.input_gradient, added)
