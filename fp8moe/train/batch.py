"""How many sequences a step takes: global batch = dp x micro_batch x micro-batches, always, checked before it runs.

The batch may grow along the run, as DeepSeek-V3's did (3072 to 15360 sequences over the first 469B tokens). The report
doesn't give the steps it grew in; here it grows linearly in consumed samples and is rounded down to a multiple of
`increment`, so that every size it takes can be checked beforehand and none depends on the layout of processes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fp8moe.data.packing import Batch


@dataclass(frozen=True)
class BatchConfig:
    """sequences: the global batch. micro_batch: sequences a rank computes at once; None: its whole share of the batch.

    ramp_from: the global batch that the run starts with (None: no ramp); ramp_samples: sequences over which it grows;
    increment: the batch grows in multiples of it (None: ramp_from).
    """

    sequences: int
    micro_batch: int | None = None
    ramp_from: int | None = None
    ramp_samples: int = 0
    increment: int | None = None

    def __post_init__(self) -> None:
        for name in ("sequences", "micro_batch", "ramp_from", "increment"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"batch.{name}={value} must be at least 1")
        if self.ramp_from is None:
            return
        if self.ramp_from > self.sequences:
            raise ValueError(
                f"batch.ramp_from={self.ramp_from} exceeds batch.sequences={self.sequences}: a ramp goes up, "
                f"use at most {self.sequences}"
            )
        if self.ramp_samples < 1:
            raise ValueError(
                f"batch.ramp_from={self.ramp_from} needs batch.ramp_samples of at least 1, got {self.ramp_samples}"
            )


def global_batch(config: BatchConfig, consumed: int) -> int:
    """Sequences of the step that starts after `consumed` of them: a multiple of `increment`, or `sequences` itself."""
    if config.ramp_from is None or consumed >= config.ramp_samples:
        return config.sequences
    increment = config.increment or config.ramp_from
    wanted = config.ramp_from + (config.sequences - config.ramp_from) * consumed / config.ramp_samples
    return min(config.sequences, max(config.ramp_from, int(wanted / increment) * increment))


def resolve_batch(config: BatchConfig, dp: int, *, least: int = 1, multiple: int = 1) -> BatchConfig:
    """The configuration with `micro_batch` filled in, every size the batch can take being a multiple of dp times it.

    least, multiple: of micro-batches, what the schedule needs. Raises ValueError with the nearest legal size.
    """
    smallest = config.sequences if config.ramp_from is None else config.ramp_from
    if config.micro_batch is None:
        share = max(1, smallest // dp)
        fitting = [size for size in range(1, share + 1) if _fits(share, size, least, multiple)]
        config = dataclasses.replace(config, micro_batch=max(fitting, default=1))
    assert config.micro_batch is not None
    unit = dp * config.micro_batch
    sizes = {"sequences": config.sequences}
    if config.ramp_from is not None:
        sizes |= {"ramp_from": config.ramp_from, "increment": config.increment or config.ramp_from}
    for name, size in sizes.items():
        if size % unit:
            nearest = max(1, round(size / unit)) * unit
            raise ValueError(
                f"batch.{name}={size} is no multiple of dp x batch.micro_batch = {dp} x {config.micro_batch} = {unit}: "
                f"use {nearest}"
            )
        if (size // unit < least and name != "increment") or (size // unit) % multiple:
            enough = max(least, -(-(size // unit) // multiple) * multiple) * unit
            raise ValueError(
                f"batch.{name}={size} makes {size // unit} micro-batches of dp x batch.micro_batch = {dp} x "
                f"{config.micro_batch} sequences and the pipeline's schedule needs at least {least}"
                f"{f', in multiples of {multiple}' if multiple > 1 else ''}: use {enough}"
            )
    return config


def _fits(share: int, micro_batch: int, least: int, multiple: int) -> bool:
    count, rest = divmod(share, micro_batch)
    return rest == 0 and count >= least and count % multiple == 0


def pieces(ids: Sequence[int], size: int) -> list[Sequence[int]]:
    """Consecutive pieces of `size` sample numbers: the micro-batches."""
    return [ids[start : start + size] for start in range(0, len(ids), size)]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`, without waiting for the copy."""
    if device.type == "cpu":
        return batch
    documents_BS = batch.documents_BS
    return Batch(
        batch.inputs_BS.to(device, non_blocking=True),
        batch.labels_BS.to(device, non_blocking=True),
        batch.positions_BS.to(device, non_blocking=True),
        None if documents_BS is None else documents_BS.to(device, non_blocking=True),
    )
