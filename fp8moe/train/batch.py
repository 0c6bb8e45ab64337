"""Batch sizes: the global batch of a step is dp x micro_batch x micro-batches, checked before the run starts.

The batch may grow along the run, as DeepSeek-V3's did (3072 to 15360 sequences over the first 469B tokens). The report
doesn't give the steps it grew in; here it grows linearly in consumed samples and is rounded down to a multiple of
`increment`, so that every size it takes can be checked beforehand and none depends on the layout of processes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fp8moe.data.packing import Batch, WholeSequences
from fp8moe.layers.attention.zigzag import part_of
from fp8moe.limits import Range, check_fields
from fp8moe.model.config import FP8_MULTIPLE
from fp8moe.model.transformer import labels_after_next, next_ids


@dataclass(frozen=True)
class BatchConfig:
    """Sizes of the global batch and of a micro-batch, and how the global batch grows."""

    sequences: int  # of the global batch, dp x micro_batch x micro-batches
    # sequences a rank computes at once; None: the largest part of its share of the batch that gives the schedule enough
    # micro-batches and, on a GPU, fits its memory by the formulas
    micro_batch: int | None = None
    ramp_from: int | None = None  # sequences of the global batch that the run starts with; None: it does not grow
    ramp_samples: int = 0  # sequences over which the batch grows
    increment: int | None = None  # the batch grows in multiples of this; None: of ramp_from

    def __post_init__(self) -> None:
        sequences = Range(least=1, most=2**20)  # the largest known batches have 2^14
        check_fields(
            self,
            "batch",
            sequences=sequences,
            micro_batch=sequences,
            ramp_from=sequences,
            ramp_samples=Range(least=0, most=2**53),
            increment=sequences,
        )
        if self.ramp_from is None:
            return
        if self.ramp_from > self.sequences:
            raise ValueError(
                f"batch.ramp_from={self.ramp_from} exceeds batch.sequences={self.sequences} and a ramp goes up: "
                f"use at most {self.sequences}"
            )
        if self.ramp_samples < 1:
            raise ValueError(
                f"batch.ramp_from={self.ramp_from} needs batch.ramp_samples of at least 1, got {self.ramp_samples}: "
                "use the sequences over which the batch grows, or batch.ramp_from=null"
            )


def global_batch(config: BatchConfig, consumed: int) -> int:
    """Sequences of the step that starts after `consumed` of them: a multiple of `increment`, or `sequences` itself."""
    if config.ramp_from is None or consumed >= config.ramp_samples:
        return config.sequences
    increment = config.increment or config.ramp_from
    wanted = config.ramp_from + (config.sequences - config.ramp_from) * consumed / config.ramp_samples
    return min(config.sequences, max(config.ramp_from, int(wanted / increment) * increment))


def total_samples(config: BatchConfig, steps: int) -> int:
    """Sequences of the first `steps` steps."""
    consumed = done = 0
    while done < steps and config.ramp_from is not None and consumed < config.ramp_samples:
        consumed, done = consumed + global_batch(config, consumed), done + 1
    return consumed + (steps - done) * config.sequences


def steps_for(config: BatchConfig, samples: int) -> int:
    """The least number of steps, at least 1, that take `samples` sequences or more."""
    consumed = done = 0
    while config.ramp_from is not None and consumed < min(samples, config.ramp_samples):
        consumed, done = consumed + global_batch(config, consumed), done + 1
    return max(1, done + -(-max(0, samples - consumed) // config.sequences))


def resolve_batch(config: BatchConfig, dp: int, *, cp: int = 1, least: int = 1, multiple: int = 1) -> BatchConfig:
    """The configuration with `micro_batch` filled in, after a check that every size of the batch suits dp ranks.

    Every size must be a multiple of dp / cp x micro_batch; cp divides dp. least, multiple: the micro-batches that the
    schedule needs, in multiples of. Raises ValueError with the nearest legal size.
    """
    dp, ranks = dp // cp, data_ranks_in_words(cp)
    if config.micro_batch is None:
        fitting = micro_batches(config, dp, least=least, multiple=multiple)
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
                f"batch.{name}={size} must be a multiple of {ranks} x batch.micro_batch = {dp} x "
                f"{config.micro_batch} = {unit}: use {nearest}"
            )
        if (size // unit < least and name != "increment") or (size // unit) % multiple:
            enough = max(least, -(-(size // unit) // multiple) * multiple) * unit
            raise ValueError(
                f"batch.{name}={size} makes {size // unit} micro-batches of {ranks} x batch.micro_batch = {dp} x "
                f"{config.micro_batch} sequences and the pipeline's schedule needs at least {least}"
                f"{f', in multiples of {multiple}' if multiple > 1 else ''}: use {enough}"
            )
    return config


def check_tokens(micro_batch: int, seq_len: int, cp: int) -> None:
    """Raise ValueError unless FP8 can cast a rank's tokens of a micro-batch, which it does along both dimensions."""
    tokens = micro_batch * seq_len // cp
    if tokens % FP8_MULTIPLE:
        multiple = FP8_MULTIPLE * cp
        nearest = max(multiple, round(seq_len / multiple) * multiple)
        share = f" / parallel.cp={cp}" if cp > 1 else ""
        raise ValueError(
            f"batch.micro_batch x seq_len{share} = {micro_batch} x {seq_len}{share and f' / {cp}'} = {tokens} tokens "
            f"must be a multiple of {FP8_MULTIPLE}, which FP8 needs: use seq_len={nearest}"
        )


def check_parts(seq_len: int, cp: int) -> None:
    """Raise ValueError unless a sequence can be cut into two equal parts a rank."""
    if cp > 1 and seq_len % (2 * cp):
        nearest = max(2 * cp, round(seq_len / (2 * cp)) * 2 * cp)
        legal = max((d for d in range(1, cp) if seq_len % (2 * d) == 0), default=1)
        raise ValueError(
            f"parallel.cp={cp} cuts a sequence into 2 x {cp} equal parts and seq_len={seq_len} is no multiple of "
            f"{2 * cp}: use seq_len={nearest} or parallel.cp={legal}"
        )


def data_ranks_in_words(cp: int) -> str:
    """How the number of ranks that read sequences of their own is written."""
    return "dp" if cp == 1 else "dp / cp"


def micro_batches(config: BatchConfig, dp: int, *, least: int = 1, multiple: int = 1) -> list[int]:
    """The micro-batches, ascending, that divide a rank's share of the smallest batch into enough for the schedule."""
    share = max(1, (config.sequences if config.ramp_from is None else config.ramp_from) // dp)
    return [size for size in range(1, share + 1) if _fits(share, size, least, multiple)]


def _fits(share: int, micro_batch: int, least: int, multiple: int) -> bool:
    count, rest = divmod(share, micro_batch)
    return rest == 0 and count >= least and count % multiple == 0


def microbatches_of(ids: Sequence[int], size: int) -> list[Sequence[int]]:
    """Sample numbers cut into micro-batches of `size`, in order."""
    return [ids[start : start + size] for start in range(0, len(ids), size)]


def pinned(batch: Batch, device: torch.device) -> Batch:
    """The batch in pinned memory where `device` is a GPU, else itself."""
    return _each(batch, lambda tensor: tensor.pin_memory()) if device.type == "cuda" else batch


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`; to a GPU they go by pinned memory, without a wait for the copies."""
    if device.type == "cpu":
        return batch
    # From pageable memory the host would wait for the copy, and with it for everything before it on the stream.
    return _each(pinned(batch, device), lambda tensor: tensor.to(device, non_blocking=True))


def share_of(batch: Batch, rank: int, cp: int) -> Batch:
    """The tokens of every sequence that rank `rank` of `cp` computes, and what it needs of those behind its borders."""
    if cp == 1:
        return batch
    whole = WholeSequences(
        part_of(next_ids(batch).view_as(batch.inputs_BS), rank, cp),
        part_of(labels_after_next(batch), rank, cp),
        batch.positions_BS,
    )
    inputs_BS, labels_BS, positions_BS = (
        part_of(x, rank, cp) for x in (batch.inputs_BS, batch.labels_BS, batch.positions_BS)
    )
    experts_BSLK = None if batch.experts_BSLK is None else part_of(batch.experts_BSLK, rank, cp)
    return Batch(inputs_BS, labels_BS, positions_BS, batch.document_lengths, whole, experts_BSLK)


def _each(batch: Batch, made: Callable[[Tensor], Tensor]) -> Batch:
    whole = batch.whole
    if whole is not None:
        whole = WholeSequences(made(whole.next_ids_BS), made(whole.mtp_labels_BS), made(whole.positions_BS))
    experts_BSLK = None if batch.experts_BSLK is None else made(batch.experts_BSLK)
    tensors = made(batch.inputs_BS), made(batch.labels_BS), made(batch.positions_BS)
    return Batch(*tensors, batch.document_lengths, whole, experts_BSLK)
