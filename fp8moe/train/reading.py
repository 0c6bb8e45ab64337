"""What a step takes from the data: this rank's micro-batches, read ahead of training by a thread (`data.prefetch`).

Which samples a step takes depends on the samples consumed before it alone, a growing batch included, so each read is
named by that number. On a GPU the thread copies the micro-batches to pinned memory as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fp8moe.data.packing import Batch, Dataset
from fp8moe.data.prefetch import Prefetcher
from fp8moe.data.sampler import rank_slice
from fp8moe.model.loss import count_predicted
from fp8moe.model.transformer import labels_after_next
from fp8moe.parallel.mesh import Mesh
from fp8moe.train.batch import global_batch, microbatches_of, pinned, share_of
from fp8moe.train.config import TrainConfig


@dataclass(frozen=True)
class StepBatches:
    """This rank's micro-batches of one step. predicted: int64 [2], tokens that the model and the MTP module predict."""

    batches: list[Batch]
    predicted: Tensor


def step_reader(config: TrainConfig, dataset: Dataset, mesh: Mesh, device: torch.device) -> Prefetcher[StepBatches]:
    """What reads the step that begins after so many consumed samples; its thread starts with the first step."""

    def read(consumed: int) -> StepBatches:
        stop = consumed + global_batch(config.batch, consumed)
        mine = rank_slice(list(range(consumed, stop)), mesh.data_rank, mesh.data_ranks)
        whole = [dataset.batch(ids) for ids in microbatches_of(mine, config.micro_batch)]
        batches = [share_of(batch, mesh.cp_rank, mesh.cp) for batch in whole]
        counts = [count_predicted(batch.labels_BS, labels_after_next(batch)) for batch in batches]
        predicted = torch.tensor(counts).sum(0)
        return StepBatches([pinned(batch, device) for batch in batches], predicted)

    def use_device() -> None:
        if device.type == "cuda":  # a new thread is on device 0, and pinning would make a context there
            torch.cuda.set_device(device)

    return Prefetcher(
        read,
        lambda consumed: consumed + global_batch(config.batch, consumed),
        ahead=config.data.prefetch,
        on_start=use_device,
    )
