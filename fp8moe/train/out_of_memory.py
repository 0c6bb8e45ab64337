"""A failed allocation as a sentence: its cause, what this rank holds, and first the setting that lowers the cause.

The cause is one of `CAUSES`. It is found by, in this order: where the allocation failed (the head's logits, the
optimizer's step); how many tokens chose this rank's experts, by its own tokens of the step so far; whether what lives
from step to step is most of what the process held at its peak, and which kind of it. What remains are activations.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from types import TracebackType

import torch

from fp8moe.errors import OutOfMemoryError, is_out_of_memory
from fp8moe.layers.recipe import Recompute
from fp8moe.parallel.place import rank_in_words
from fp8moe.train.config import TrainConfig
from fp8moe.train.memory import in_words, measured_bytes, memory_bytes
from fp8moe.train.run import Run

LOGITS, OPTIMIZER, IMBALANCE, WEIGHTS, ACTIVATIONS = CAUSES = (
    "the head's logits and loss",
    "masters and moments of the optimizer",
    "an uneven choice of experts",
    "weights, their FP8 copies and gradients",
    "activations of a micro-batch",
)
_SITES = (("model/head_loss.py", LOGITS), ("train/optimizer/", OPTIMIZER))
UNEVEN = 1.5  # times an even share, from which routing is called the cause
_OPTIMIZERS = ("masters", "moments")


@contextlib.contextmanager
def out_of_memory_in_words(run: Run) -> Iterator[None]:
    """Turn a failed allocation within the block into an OutOfMemoryError that names its cause and what lowers it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error) or isinstance(error, OutOfMemoryError):
            raise
        said = re.sub(r"\[[^\]]*:\d+\]\s*(err == 0\. )?", "", " ".join(str(error).split())).split(". ")[0][:200]
        held, share = measured_bytes(run.model, run.optimizer), received_share(run)
        cause = cause_of(site_of(error.__traceback__), share, held, memory_bytes(run.device))
        much = f", {share:.2g} times an even share for this rank's" if cause is IMBALANCE else ""
        raise OutOfMemoryError(
            f"out of memory in step {run.step + 1} on {rank_in_words(run.mesh.rank)} ({said}), most likely by {cause}"
            f"{much}: it holds {in_words(held)}, and activations and messages beside{_of_gpu(run.device)}: use "
            f"{', or '.join(savings(cause, run.config))}"
        ) from error


def site_of(traceback: TracebackType | None) -> str | None:
    """The cause that the innermost frame of `_SITES` stands for; None where no frame is one."""
    found = None
    while traceback is not None:
        path = traceback.tb_frame.f_code.co_filename.replace("\\", "/")
        found = next((cause for part, cause in _SITES if f"fp8moe/{part}" in path), found)
        traceback = traceback.tb_next
    return found


def cause_of(site: str | None, share: float, held: Mapping[str, int], peak: int) -> str:
    """One of `CAUSES`. share: of `received_share`; held: bytes by kind; peak: the most that the process has held."""
    if site is not None:
        return site
    if share >= UNEVEN:
        return IMBALANCE
    if sum(held.values()) <= peak / 2:
        return ACTIVATIONS
    optimizer = sum(held[kind] for kind in _OPTIMIZERS)
    return OPTIMIZER if optimizer > sum(held.values()) / 2 else WEIGHTS


def received_share(run: Run) -> float:
    """How often this rank's experts were chosen, as a multiple of an even share: the layer with the most, by the tokens
    of this rank since the last update. 1 where there is nothing to divide or count."""
    ep, worst = run.config.ep, 1.0
    place = run.mesh.rank % ep  # neighbours share the experts
    for router in run.routers().values():
        total, mine = int(router.counts_E.sum()), int(router.counts_E.view(ep, -1)[place].sum())
        worst = max(worst, mine * ep / total if total else 1.0)
    return worst


def savings(cause: str, config: TrainConfig) -> list[str]:
    """Settings that need less memory: first those that lower `cause`, then those of activations, then more ranks."""
    lower = _lower_activations(config)
    if cause is OPTIMIZER:
        lower = [*_lower_optimizer(config), *lower]
    elif cause is WEIGHTS:
        lower = [*_lower_weights(config), *lower]
    elif cause is IMBALANCE:
        router = config.model.router
        by_bias = f"a faster balance (model.router.bias_gamma above {router.bias_gamma:g})"
        by_loss = f"a stronger balance loss (model.router.aux_loss_alpha above {router.aux_loss_alpha:g})"
        lower = [by_bias if router.bias_gamma else by_loss, *lower]
    elif cause is LOGITS and config.parallel.pp > 1:
        fewer = "fewer blocks beside the head (parallel.layout)"
        lower = [*lower[:1], fewer, *lower[1:]] if config.micro_batch > 1 else [fewer, *lower]
    return list(dict.fromkeys([*lower, f"seq_len below {config.seq_len}", "more ranks (parallel.pp, parallel.ep)"]))


def _lower_activations(config: TrainConfig) -> list[str]:
    """Those that change no result."""
    found = []
    if config.micro_batch > 1:
        found.append(f"batch.micro_batch={config.micro_batch // 2}")
    if len(config.recompute) < len(Recompute):
        found.append(f"recompute=[{','.join(Recompute)}]")
    if config.optimizer.sharding == "none" and config.dp > 1:
        found.append("optimizer.sharding=zero1")
    return found


def _lower_optimizer(config: TrainConfig) -> list[str]:
    found = []
    if config.optimizer.sharding == "none" and config.dp > 1:
        found.append("optimizer.sharding=zero1")
    if config.optimizer.moments == "fp32" and config.optimizer.sharding != "deepspeed":
        found.append("optimizer.moments=bf16")
    if config.optimizer.sharding != "none":
        found.append("more data-parallel ranks, which share them out")
    return [*found, *(["optimizer=muon, with one moment"] if config.optimizer.kind == "adamw" else [])]


def _lower_weights(config: TrainConfig) -> list[str]:
    ep = config.ep * 2
    spread = config.model.has_experts and config.dp % ep == 0 and config.model.experts.num_experts % ep == 0
    return [*([f"parallel.ep={ep}"] if spread else []), f"parallel.pp={config.parallel.pp * 2} on twice the ranks"]


def _of_gpu(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    peak, total = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
    return f" (at most {peak / 1e9:.3g} GB in all, of the GPU's {total / 1e9:.3g} GB)"
