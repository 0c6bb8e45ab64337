"""The layers that `bench_layer` times, and one such layer as a schedule runs it, phase by phase.

The models are those of `configs/model`, written again because a machine of kernels may lack the composer's packages; a
test holds them to each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import torch

from fp8moe.layers.attention import MlaConfig
from fp8moe.layers.dispatch import LocalDispatcher
from fp8moe.layers.linear import quantize_weights
from fp8moe.layers.moe import ExpertsConfig
from fp8moe.layers.recipe import Precision, Recipe
from fp8moe.layers.router import RouterConfig
from fp8moe.model.config import ModelConfig
from fp8moe.model.flops import FORWARD_AND_BACKWARD, block_parameters
from fp8moe.model.phases import BalanceLoss, pass_through
from fp8moe.model.transformer import Transformer

DSV3 = ModelConfig(
    vocab_size=129280, dim=7168, num_layers=61, num_dense_layers=3, dense_hidden=18432,
    attention=MlaConfig(num_heads=128, q_lora_rank=1536, kv_lora_rank=512, nope_dim=128, rope_dim=64, v_dim=128),
    router=RouterConfig(topk=8, num_groups=8, top_groups=4, route_scale=2.5),
    experts=ExpertsConfig(num_experts=256, hidden=2048), mtp_depth=1,
)  # fmt: skip
DSV2_LITE = ModelConfig(
    vocab_size=102400, dim=2048, num_layers=27, num_dense_layers=1, dense_hidden=10944,
    attention=MlaConfig(num_heads=16, kv_lora_rank=512, nope_dim=128, rope_dim=64, v_dim=128),
    router=RouterConfig(topk=6, score="softmax", normalize_topk=False, aux_loss_alpha=1e-3, bias_gamma=0.0),
    experts=ExpertsConfig(num_experts=64, hidden=1408, num_shared=2),
)  # fmt: skip
SMALL = ModelConfig(
    vocab_size=256, dim=128, num_layers=1, num_dense_layers=0, dense_hidden=128,
    attention=MlaConfig(num_heads=2, kv_lora_rank=64, nope_dim=32, rope_dim=16, v_dim=32),
    router=RouterConfig(topk=2), experts=ExpertsConfig(num_experts=4, hidden=64),
)  # fmt: skip

# By device. dsv3: with 32 of its experts. qwen3_mixture: the experts and routing of Qwen3-30B-A3B's config.json.
LAYERS: Mapping[str, Mapping[str, ModelConfig]] = MappingProxyType(
    {
        "cuda": {
            "dsv3": replace(DSV3, experts=replace(DSV3.experts, num_experts=32)),
            "dsv2_lite": DSV2_LITE,
            "qwen3_mixture": replace(
                DSV2_LITE,
                router=replace(DSV2_LITE.router, topk=8, normalize_topk=True),
                experts=ExpertsConfig(num_experts=128, hidden=768, num_shared=0),
            ),
        },
        "cpu": {"small": SMALL},
    }
)


class LayerStep:
    """Forward, backward and weight gradients of a model's last block, a mixture, on sequences of `sequence` tokens.

    tokens: of all sequences together, a multiple of `sequence`; without it they are one sequence.
    """

    def __init__(
        self, config: ModelConfig, precision: Precision, tokens: int, device: torch.device, sequence: int | None = None
    ) -> None:
        layer = config.num_layers - 1
        dispatcher = LocalDispatcher(config.experts.num_experts)
        with device:
            self.model = Transformer(
                config, Recipe(precision), dispatcher, layers=(layer,), embedding=False, head=False
            )
        _fill(self.model, config.init_std)
        self._block = self.model.block(layer)
        sequence = sequence or tokens
        self._positions = self.model.positions(torch.arange(sequence, device=device).repeat(tokens // sequence, 1))
        generator = torch.Generator().manual_seed(0)
        x, dy = torch.randn(2, tokens, config.dim, generator=generator).to(device, precision.dtype)
        self._x_TD, self._dy_TD = x, dy / tokens

    def __call__(self) -> tuple[torch.Tensor, torch.Tensor]:
        """-> the block's output and the gradient of its input, [T, D]."""
        one = pass_through(self._block, lambda: self._x_TD, self._positions, BalanceLoss(1e-4, lambda loss: None))
        for phase in one.phases:
            phase.forward()
        output_TD = one.output
        one.backward_from(lambda: self._dy_TD)
        for phase in reversed(one.phases):
            phase.backward()
        for phase in one.phases:
            if phase.wgrad is not None:
                phase.wgrad()
        return output_TD, one.input_gradient


@torch.no_grad()
def _fill(model: Transformer, std: float) -> None:
    """Random weights where the model lies; `init_weights` draws them on the host, expert by expert, for minutes."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=std, generator=generator)
    quantize_weights(model)


def layer_flops(config: ModelConfig, tokens: int, sequence: int | None = None) -> float:
    """FLOPs of that, counted as `model.flops` counts a model's, attention causal."""
    active = 2.0 * block_parameters(config, config.num_layers - 1, active=True)
    return (
        FORWARD_AND_BACKWARD * tokens * (active + config.attention.core_flops(sequence or tokens, causal=True, layer=0))
    )
