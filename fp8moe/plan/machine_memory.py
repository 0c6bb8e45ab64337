"""Whether the memory of a CPU's machine can hold a run at all, by closed formulas, before a process starts.

What is compared is the least that the run needs: weights, gradients, masters and moments of the pipeline's ranks on
average, shared out over every replica; of GRPO the reference as well, and a teacher's weights. No activations, caches
or buffers are counted, so that nothing that fits is refused; what passes here and does not fit is an OutOfMemoryError
of its step. A GPU's memory is `plan.fit`'s.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from fp8moe.errors import ConfigError
from fp8moe.layers.recipe import Precision
from fp8moe.model.memory import rank_parameters
from fp8moe.plan.rollout_memory import is_policy
from fp8moe.plan.teacher import teacher_bytes, teacher_of
from fp8moe.train.config import TrainConfig, stages_of
from fp8moe.train.memory import replicas_of

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def check_host(config: TrainConfig, local_processes: int) -> None:
    """Raise ConfigError where the processes of this machine need more memory than it has."""
    there = host_bytes()
    parameters, need = least_of_rank(config)
    if there is None or need * local_processes <= there:
        return
    whose = "a rank needs" if local_processes == 1 else f"{local_processes} processes on this machine need"
    out = "use a smaller model (model.dim, model.num_layers, model.experts.num_experts)"
    if config.optimizer.sharding == "none" and config.dp > 1:
        out = f"use optimizer.sharding=zero1, or {out.removeprefix('use ')}"
    raise ConfigError(
        f"{whose} at least {need * local_processes / 1e9:.3g} GB for weights, gradients and optimizer state "
        f"({parameters:.3g} parameters each) and this machine has {there / 1e9:.3g} GB: {out}, or more machines "
        "(parallel.pp, parallel.ep), or plan=off to try"
    )


def least_of_rank(config: TrainConfig) -> tuple[float, float]:
    """Parameters of a rank, the mean of its pipeline, and the bytes that these need at least."""
    parameters = rank_parameters(config.model, stages_of(config), config.ep) / config.parallel.pp
    weight = 4 if config.precision.mode is Precision.FP32 else 2
    moment = 2 if config.optimizer.moments == "bf16" else 4
    kept = (0 if weight == 4 else 4) + (1 if config.optimizer.kind == "muon" else 2) * moment
    if is_policy(config) and config.grpo.kl:
        kept += 4
    teacher = teacher_of(config)
    taught = 0.0 if teacher is None else teacher_bytes(teacher, config.ep)
    return parameters, parameters * (weight + 4 + kept / max(replicas_of(config).values())) + taught


def host_bytes() -> int | None:
    """Bytes of memory that this process may use: the machine's, or less where its group has a limit; None: unknown."""
    found = []
    with contextlib.suppress(ValueError, OSError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in CGROUP_LIMITS:
        with contextlib.suppress(ValueError, OSError):  # "max": no limit
            found.append(int(Path(path).read_text()))
    return min(found, default=None)
