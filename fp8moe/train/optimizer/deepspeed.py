"""DeepSpeed's ZeRO-1 behind the optimizer's interface: `optimizer.sharding=deepspeed`, for pp=1 and FP32 moments.

Masters and moments are cut over the replicas of a parameter: dense ones over dp, experts' over edp. `reduce` hands
`main_grad` to DeepSpeed, which sums it over the replicas and keeps this rank's part; `step` has torch's fused AdamW
update that part, and DeepSpeed gather the weights. The numerics are `adamw.AdamWUpdate`'s with FP32 moments: FP32
gradients, summed once a step; decay on matrices only; one clip factor, of the norm over all parameters.

DeepSpeed's optimizer is used without its engine, which casts, broadcasts, hooks and schedules the model by itself.
Three settings differ from the engine's:

- Gradients arrive in FP32 for BF16 weights. For that the engine takes another class (`BF16_Optimizer`), which keeps
  FP32 gradients of the whole model a second time, and whose norm is wrong with experts; here ZeRO's buffers are FP32.
- DeepSpeed divides sums by dp; it is told a loss scale of 1/dp, so that it multiplies them back. The clip factor goes
  the same way: DeepSpeed's own norm reads -1 where a gradient is not finite, which would hide it from the guard.
- Its hooks on backward are removed: gradients are handed over once a step.

Checkpoints hold whole tensors by canonical names, which other layouts and optimizers (with FP32 moments) resume. They
are gathered over the replicas: while one is written, each rank holds the whole state of its parameters.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import Parameter

from fp8moe.errors import ConfigError
from fp8moe.kernels.squared_norm import squared_norm
from fp8moe.layers.linear import MainGrads, decays, is_expert, main_grad_of, quantize_weights
from fp8moe.parallel import hang
from fp8moe.parallel.collectives import all_reduce
from fp8moe.parallel.gradients import BUCKET
from fp8moe.parallel.mesh import Mesh
from fp8moe.profile.spans import waiting
from fp8moe.train.optimizer.config import OptimizerConfig
from fp8moe.train.optimizer.state import Held

EXPERTS = "experts"  # DeepSpeed's name for the group of experts' parameters
MOMENTS = ("exp_avg", "exp_avg_sq")


def check_deepspeed(*, pp: int, dp: int, background: bool, averaged: bool) -> None:
    """Raise ConfigError unless optimizer.sharding=deepspeed can work with that layout and those checkpoints."""
    wrong = None
    if pp > 1:
        wrong = f"needs parallel.pp=1 and parallel.pp={pp}: use parallel.pp=1, or optimizer.sharding=auto"
    elif dp == 1:
        wrong = "needs at least 2 data-parallel processes and there is 1: start 2, or use optimizer.sharding=auto"
    elif background:
        wrong = "gathers its state for a checkpoint between steps: use checkpoint.background=false, not true"
    elif averaged:
        wrong = "keeps masters that are not averaged: use ema.decay=null, or optimizer.sharding=auto"
    elif importlib.util.find_spec("deepspeed") is None:
        wrong = 'needs the package deepspeed, which is not installed: pip install "fp8moe[deepspeed]"'
    if wrong is not None:
        raise ConfigError(f"optimizer.sharding=deepspeed {wrong}")


class DeepSpeedAdamW:
    """Updates the parameters of `model`, which must have been initialised, from their `main_grad` in `main_grads`.

    Parameters become views of DeepSpeed's flat buffers. Collective over dp: construction, every method, `held`.
    """

    def __init__(self, model: nn.Module, main_grads: MainGrads, config: OptimizerConfig, mesh: Mesh) -> None:
        assert mesh.dp_group is not None, "at least two replicas"
        self.config, self._group, self._dp = config, mesh.dp_group, mesh.dp
        self._model, self._updates = model, 0
        self._named = dict(model.named_parameters())
        elements = main_grads.dense.numel() + main_grads.expert.numel()
        self._zero = _zero_optimizer(self._named, elements, config, mesh, main_grads.dense.device)

    @property
    def updates(self) -> int:
        """Updates done: the bias correction's step, which a skipped step doesn't advance."""
        return self._updates

    @updates.setter
    def updates(self, number: int) -> None:
        self._updates = number
        for state in self._zero.state.values():
            state["step"].fill_(number)

    def reduce(self) -> float:
        """Sum `main_grad` over the replicas -> the norm of all gradients, each parameter counted once.

        The sums lie in DeepSpeed's buffers afterwards; `main_grad` has lost its meaning until it is zeroed.
        """
        for parameter in self._named.values():
            parameter.grad = main_grad_of(parameter).detach()  # a tensor of its own: DeepSpeed sets its storage
        with waiting(), hang.collective(self._group, "gradients (DeepSpeed)"):
            self._zero.reduce_gradients(pipeline_parallel=True)
        parts = [part for parts in self._zero.averaged_gradients.values() for part in parts]
        squared = torch.stack([squared_norm(part.reshape(-1)) for part in parts]).sum()
        return self._dp * float(all_reduce(squared, self._group).sqrt())

    def step(self, lr: float, grad_norm: float) -> None:
        """One update at learning rate `lr`, gradients scaled down to `clip_norm` where `grad_norm` exceeds it.

        Weights, their FP8 blocks, masters and moments change.
        """
        self._updates += 1
        self._zero.override_loss_scale(1.0 / (self._dp * self.config.grad_scale(grad_norm)))
        self._zero.set_lr(lr)
        with hang.collective(self._group, "update (DeepSpeed)"):
            self._zero.step()
        quantize_weights(self._model)

    @property
    def held(self) -> dict[str, list[Held]]:
        """All that a checkpoint must hold, whole, by canonical name; gathered: copies."""
        from deepspeed import utils

        return {
            name: [
                Held(
                    parameter,
                    0,
                    {"master": utils.safe_get_full_fp32_param(parameter).flatten()}
                    | {m: utils.safe_get_full_optimizer_state(parameter, m).flatten() for m in MOMENTS},
                )
            ]
            for name, parameter in self._named.items()
        }

    def load(self, held: Mapping[str, list[Held]]) -> None:
        """Keep this rank's part of masters and moments, as `held` gave them; then `write_parameters`."""
        from deepspeed import utils

        for (one,) in held.values():
            whole = {kind: tensor.view(one.parameter.shape) for kind, tensor in one.tensors.items()}
            utils.safe_set_full_fp32_param(one.parameter, whole["master"])
            for moment in MOMENTS:
                utils.safe_set_full_optimizer_state(one.parameter, whole[moment], moment)

    def write_parameters(self) -> None:
        """Round the masters, after they were loaded, into parameters and FP8 blocks."""
        self._zero.update_lp_params()
        quantize_weights(self._model)

    def kept_bytes(self) -> tuple[int, int]:
        """Bytes of this rank's masters and of its moments."""
        parts = [part for group in self._zero.optimizer.param_groups for part in group["params"]]
        return sum(part.nbytes for part in parts), sum(2 * part.nbytes for part in parts)


def _zero_optimizer(
    named: Mapping[str, Parameter], elements: int, config: OptimizerConfig, mesh: Mesh, device: torch.device
) -> Any:
    """DeepSpeed's ZeRO-1 over torch's AdamW, whose state exists from the start."""
    _start_deepspeed(device)
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.utils.timer import NoopTimer

    groups = _parameter_groups(named, config.weight_decay)
    has_experts = any(group.get("moe") for group in groups)
    alone = dist.new_group([mesh.rank], use_local_synchronization=True)  # where the mesh has no group
    adamw = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
    zero = DeepSpeedZeroOptimizer(
        adamw,
        {parameter: name for name, parameter in named.items()},
        timers=NoopTimer(),
        optimizer_params={},
        verbose=False,
        partition_grads=False,  # stage 1
        reduce_bucket_size=min(BUCKET, elements),
        dp_process_group=mesh.dp_group,
        has_moe_layers=has_experts,
        expert_parallel_group={EXPERTS: mesh.ep_group or alone} if has_experts else None,
        expert_data_parallel_group={EXPERTS: mesh.expert_group or alone} if has_experts else None,
        gradient_accumulation_dtype=groups[0]["params"][0].dtype,  # the weights': no second copy of gradients
        communication_data_type=torch.float32,
        check_grad_overflow=False,  # the guard's
    )
    for hook in zero._grad_acc_hooks:
        hook.remove()
    zero.dtype = zero.gradient_accumulation_dtype = torch.float32  # of the buffers that reduced gradients lie in
    for group in adamw.param_groups:
        for part in group["params"]:
            moments = {moment: torch.zeros_like(part, requires_grad=False) for moment in MOMENTS}
            adamw.state[part] = {"step": torch.zeros((), device=device), **moments}
    zero._lazy_init_hp_params_optimizer_state()
    return zero


def _start_deepspeed(device: torch.device) -> None:
    """Import DeepSpeed silently, for the run's device and on the process groups that exist."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)  # it calls by that
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled at start for inference on CPUs alone
    deepspeed.comm.init_distributed(verbose=False)


def _parameter_groups(named: Mapping[str, Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """torch's groups of parameters that share dtype, decay and replicas; experts are marked as DeepSpeed needs it."""
    groups: dict[tuple[bool, bool, torch.dtype], dict[str, Any]] = {}
    for parameter in named.values():
        expert, shrinks = is_expert(parameter), decays(parameter)
        parameter.grad_dtype = torch.float32
        if expert:
            parameter.allreduce, parameter.group_name = False, EXPERTS  # type: ignore[attr-defined]
        shared = {"weight_decay": weight_decay if shrinks else 0.0} | ({"moe": True, "name": EXPERTS} if expert else {})
        groups.setdefault((expert, shrinks, parameter.dtype), {"params": [], **shared})["params"].append(parameter)
    return list(groups.values())
