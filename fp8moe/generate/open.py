"""A trained model opened for use: all of its blocks on every rank, experts over ep, no pipeline and no optimizer.

Weights are a checkpoint's masters, or their average, rounded to the run's precision; FP8 weights are cast as in
training. Weights from elsewhere, a released model's, come as `ForeignWeights`: `interop` opens them, the command hands
them over.
Ranks are dp = ep x replicas; sequences are dealt out over all of them. Rows go to experts by exact counts and without a
bound on imbalance, whatever the run had: a step of a few tokens is never balanced.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import Parameter

from fp8moe.errors import ConfigError
from fp8moe.kernels.backend import set_backend
from fp8moe.layers.dispatch import Dispatcher
from fp8moe.layers.linear import is_expert, quantize_weights
from fp8moe.layers.router import Router
from fp8moe.model.transformer import Transformer
from fp8moe.parallel.config import ParallelConfig
from fp8moe.parallel.dispatch import make_dispatcher
from fp8moe.parallel.mesh import Mesh, validate_mesh
from fp8moe.train import checkpoint
from fp8moe.train.config import TrainConfig

Tensors = dict[str, Tensor | checkpoint.Pieces]
MOST_VALUES = 1 << 28  # that are read at once, in FP32


def for_use(config: TrainConfig, world_size: int, ep: int | None) -> TrainConfig:
    """A run's configuration on `world_size` processes that only compute forwards, experts over `ep` of them.

    ep: None for the most that experts divide over. Raises ValueError or ConfigError. Chooses the kernels' back end.
    """
    experts = config.model.experts.num_experts
    validate_mesh(world_size, 1, 1 if ep is None else ep, experts)
    if config.precision.backend is not None:
        set_backend(config.precision.backend)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda needs at least 1 CUDA device and torch sees 0: use device=cpu")
    parallel = ParallelConfig(
        dp=world_size,
        ep=math.gcd(world_size, experts) if ep is None else ep,
        communication_sms=config.parallel.communication_sms,
        timeout=config.parallel.timeout,
        startup_timeout=config.parallel.startup_timeout,
    )
    return replace(config, parallel=parallel)


def exact_dispatcher(config: TrainConfig, mesh: Mesh) -> Dispatcher:
    """A dispatcher that takes any number of tokens of each rank."""
    return make_dispatcher("all_to_all", mesh, config.model.experts.num_experts, max_tokens=1)


def load_model(
    config: TrainConfig,
    mesh: Mesh,
    device: torch.device,
    source: str | checkpoint.ForeignWeights,
    *,
    averaged: bool = False,
) -> Transformer:
    """The model with the weights of `source`; averaged: with the average of its weights.

    source: weights that were opened, or the name, a path or URL, whose newest whole checkpoint is taken; its files are
    verified first. Raises ConfigError and DataError. Collective over all ranks of `mesh`.
    """
    load = _loader(config, mesh, source, averaged=averaged)
    with device:
        model = Transformer(config.model, config.recipe, exact_dispatcher(config, mesh), gradients=False)
    kind = "ema" if averaged else "master"
    parameters = list(model.named_parameters())
    while parameters:
        count = _together([parameter for _, parameter in parameters])
        _read(load, kind, parameters[:count], mesh)
        del parameters[:count]
    biases: Tensors = {
        f"bias.{router}": module.bias_E for router, module in model.named_modules() if isinstance(module, Router)
    }
    if biases:
        load(biases)
    quantize_weights(model)
    return model.eval()


def _loader(
    config: TrainConfig, mesh: Mesh, source: str | checkpoint.ForeignWeights, *, averaged: bool
) -> Callable[[Tensors], None]:
    """What fills tensors by the names of a checkpoint."""
    if not isinstance(source, str):
        if averaged:
            raise ConfigError("--ema asks for an average of the weights, which a released model has not: leave it out")
        return source.load
    path = checkpoint.choose_weights(source, config.model, mesh, averaged=False, key="RUN")
    if averaged and not any(stored.startswith("ema.") for stored in checkpoint.stored_names(path)):
        raise ConfigError(f"{path} holds no average of the weights, which --ema asks for: leave --ema out")
    return lambda tensors: checkpoint.load(path, tensors, mesh.world_group)


def _together(parameters: list[Parameter]) -> int:
    """How many of the first parameters are read at once: at least one."""
    values = 0
    for count, parameter in enumerate(parameters):
        values += parameter.numel()
        if values > MOST_VALUES:
            return max(count, 1)
    return len(parameters)


@torch.no_grad()
def _read(load: Callable[[Tensors], None], kind: str, parameters: list[tuple[str, Parameter]], mesh: Mesh) -> None:
    values = {name: torch.empty(p.numel(), dtype=torch.float32, device=p.device) for name, p in parameters}
    pieces: Tensors = {}
    for name, parameter in parameters:
        size, spread = parameter.numel(), is_expert(parameter)
        first, length = (mesh.ep_rank * size, mesh.ep * size) if spread else (0, size)
        pieces[f"{kind}.{name}"] = checkpoint.Pieces(length, ((first, values[name]),))
    load(pieces)
    for name, parameter in parameters:
        parameter.copy_(values[name].view_as(parameter))
