"""Whole training steps under several settings, alternated in one set of processes, each recorded span by span.

A trial is one optimizer step, timed by the host's clock. Its figures come from the spans of all ranks
(`fp8moe.profile.figures`), and the simulator runs at the costs measured in the same spans.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch

from fp8moe.cli.compose import compose
from fp8moe.parallel.collectives import clock_offset, gather
from fp8moe.parallel.links import Links
from fp8moe.parallel.mesh import warm_up
from fp8moe.profile.figures import RankFigures, num_microbatches, rank_figures, window_of
from fp8moe.profile.spans import Recorder, listening
from fp8moe.schedule.build import build_schedule
from fp8moe.schedule.simulate import simulate
from fp8moe.train.build import build
from fp8moe.train.config import TrainConfig, resolve
from fp8moe.train.processes import mesh_of
from fp8moe.train.run import Run
from fp8moe.train.step import train_step
from fp8moe.train.step_trace import measured_costs

CPU = torch.device("cpu")
TIMEOUT = timedelta(seconds=600)


@dataclass(frozen=True)
class Trial:
    """One step: its seconds on the slowest rank, each rank's figures, and the simulator's makespan and mean bubble."""

    seconds: float
    ranks: tuple[RankFigures, ...]
    simulated: tuple[float, float]

    @property
    def passes(self) -> float:
        """Seconds of forwards and backwards."""
        return self.ranks[0].window

    def mean(self, figure: Literal["bubble", "computing", "communication", "exposed"]) -> float:
        """Seconds of `figure`, averaged over ranks."""
        return statistics.fmean(getattr(rank, figure) for rank in self.ranks)

    @property
    def hidden(self) -> float:
        """Hidden share of the communication of all ranks; 1 where there is none."""
        communication = self.mean("communication")
        return max(0.0, 1 - self.mean("exposed") / communication) if communication else 1.0


def configured(words: Sequence[str], world_size: int) -> TrainConfig:
    """The configuration of `words` for so many processes."""
    return resolve(compose([*words, "device=cpu", "checkpoint.at_end=false"]).config, world_size)


def built(config: TrainConfig) -> Run:
    """The run, its groups warmed. Collective."""
    mesh = mesh_of(config, CPU)
    warm_up(mesh, CPU)
    Links(mesh, TIMEOUT).warm_up(CPU)
    return build(config, mesh, CPU, Path("nowhere"))


def one_step(run: Run) -> Trial:
    """Run one recorded step of `run`. Collective."""
    group = run.mesh.world_group
    run.barrier()
    recorder, start = Recorder(), time.perf_counter()
    with listening(recorder):
        train_step(run)
    seconds, offset = time.perf_counter() - start, clock_offset(group)
    spans = [dataclasses.replace(s, start=s.start + offset, end=s.end + offset) for s in recorder.spans]
    gathered = gather((seconds, spans), group)
    recorded = [spans for _, spans in gathered]
    window = window_of(recorded)
    parallel = run.config.parallel
    schedule = build_schedule(parallel.schedule, parallel.pp, num_microbatches(recorded))
    timeline = simulate(schedule, measured_costs(recorded, schedule.num_stages))
    return Trial(
        max(seconds for seconds, _ in gathered),
        tuple(rank_figures(spans, window) for spans in recorded),
        (timeline.makespan, statistics.fmean(timeline.bubble)),
    )


def alternated(runs: Mapping[str, tuple[Run, TrainConfig]], trials: int) -> dict[str, list[Trial]]:
    """`trials` steps of each run in alternating order, after one that is not counted; runs may share a model.

    Collective.
    """
    done: dict[str, list[Trial]] = {name: [] for name in runs}
    for trial in range(trials + 1):
        for name in list(runs) if trial % 2 == 0 else reversed(list(runs)):
            run, run.config = runs[name][0], runs[name][1]
            one = one_step(run)
            if trial:
                done[name].append(one)
    return done


def overlap_and_not(run: Run) -> dict[str, tuple[Run, TrainConfig]]:
    """The same run with every message waited for at once, and with messages overlapped."""
    return {
        name: (run, dataclasses.replace(run.config, parallel=dataclasses.replace(run.config.parallel, overlap=overlap)))
        for name, overlap in (("waited at once", False), ("overlapped", True))
    }
