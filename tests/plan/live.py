"""Bytes that a training step keeps on real processes: storages alive before each of a rank's actions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

from benchmarks.live_memory import TrackStorages
from fp8moe.parallel.links import PendingReceive
from fp8moe.parallel.pipeline import Pipeline
from fp8moe.parallel.stream import HostStream
from fp8moe.plan.memory import RankMemory, rank_memory
from fp8moe.schedule.action import Action
from fp8moe.train.config import TrainConfig
from fp8moe.train.memory import measured_bytes
from fp8moe.train.step import train_step
from tests.train.runs import built


@dataclass(frozen=True)
class Live:
    """A rank: what is planned for it; bytes of its state; the most that a step kept between two actions."""

    planned: RankMemory
    state: dict[str, int]
    kept: int


def live(config: TrainConfig) -> Live:
    """One training step of a resolved configuration on this process, inside `run_ranks`.

    Tensors are counted by storage, those of the communication thread too, but for messages: receive buffers that nobody
    has asked for yet and tensors that are being sent.
    """
    run = built(config)
    tracked, most = TrackStorages(), 0
    compute, start = Pipeline._compute, HostStream.start

    def before(pipeline: Pipeline, action: Action) -> None:
        nonlocal most
        givers = [getattr(ready, "__self__", None) for ready in pipeline._ready.values()]
        messages = sum(one._buffer.nbytes for one in givers if isinstance(one, PendingReceive))
        messages += sum(tensor.nbytes for tensor, *_ in pipeline.links._sends)
        most = max(most, tracked.live_bytes() - messages)
        compute(pipeline, action)

    def started(stream: HostStream, work: Callable[[], Any], *rest: Any, **options: Any) -> Any:
        def inside() -> Any:
            with tracked:
                return work()

        return start(stream, inside, *rest, **options)

    patched = mock.patch.multiple(Pipeline, _compute=before), mock.patch.object(HostStream, "start", started)
    with patched[0], patched[1], tracked:
        train_step(run)
    planned = rank_memory(run.config, on_gpu=False)[run.mesh.pp_rank]
    return Live(planned, measured_bytes(run.model, run.optimizer), most)


def every(of_layouts: Mapping[str, TrainConfig]) -> dict[str, Live]:
    """`live` of one layout after the other, on the same processes."""
    return {name: live(config) for name, config in of_layouts.items()}
