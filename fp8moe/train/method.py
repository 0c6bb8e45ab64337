"""What a run learns from, where that is not token files by cross entropy: other data, another loss of each token.

A method brings the work of each step and nothing else of a run: schedule, pipeline, optimizer, guard, checkpoints,
metrics and resuming are those of pretraining. It is passed in, so that no floor above this one is known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from fp8moe.data.build import Data
from fp8moe.data.packing import Batch
from fp8moe.model.head_loss import ChunkLoss
from fp8moe.model.loss import LossCounts
from fp8moe.parallel.mesh import Mesh
from fp8moe.train.config import TrainConfig
from fp8moe.train.run import Run


@dataclass(frozen=True)
class StepWork:
    """This rank's micro-batches of one step, and what the whole of it predicts.

    token_loss: of the main model in place of cross entropy; its sum is divided by counts.main_tokens. mtp_weight: of
    the MTP module's loss; None: the configuration's.
    """

    batches: list[Batch]
    counts: LossCounts
    token_loss: ChunkLoss | None = None
    mtp_weight: float | None = None


class Method(Protocol):
    """The steps of a run that is not pretraining. All of it is collective over all ranks."""

    def open_data(self, config: TrainConfig, mesh: Mesh) -> Data:
        """What the run reads; its `validation` gives the validation loss."""
        ...

    def begin(self, run: Run) -> None:
        """Called once, when the run stands as it begins or goes on."""
        ...

    def work(self, run: Run) -> StepWork:
        """The work of the next step. Moves `run.sampler.consumed` on, by which alone it is chosen."""
        ...

    def figures(self, run: Run) -> Mapping[str, Any]:
        """What the step just done adds to its record in metrics.jsonl."""
        ...

    def score(self, run: Run) -> Mapping[str, Any]:
        """What a validation adds to the record of its step."""
        ...
