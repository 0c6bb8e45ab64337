"""What is too long for a line of metrics: the load of each expert, and memory and working time of each rank.

    expert_load.jsonl  {"step", "first_step", "layers": {router: [load of each expert]}}
    ranks.jsonl        {"step", "memory_bytes": [of each rank], "working_seconds": [of each rank]}

A load is the tokens that the expert had since the record before, over those of the layer's mean expert: 1 is even. It
is written with two decimals. Memory is the most that a rank has held so far; working seconds are the mean of a step
since the record before, without what the rank waited for messages. Both are of steps `first_step` to `step`.

Steps between the records cost one addition. A record costs, on all ranks, one all-reduce of two numbers a rank and one
gather of the loads over the pipeline, and rank 0 writes two lines. Routers count their tokens in any case, and the sums
of the run (`Run.loads`) are the same on all ranks of a stage.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8moe.parallel.collectives import all_reduce
from fp8moe.train.json_lines import EXPERT_LOAD, RANKS, JsonLines
from fp8moe.train.metrics import StepReport
from fp8moe.train.run import Run
from fp8moe.train.run_log import all_loads


class Detail:
    """Writes the records of a run. `note` and `forget` are called by all ranks."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._files = [JsonLines(run.run_dir / name) for name in (EXPERT_LOAD, RANKS)] if run.is_first else []
        self.forget()

    def forget(self) -> None:
        """Begin after the run's present step: records of later ones, which are done again, are removed."""
        for file in self._files:
            file.keep_until(self._run.step)
        self._before = {name: load.clone() for name, load in self._run.loads.items()}
        self._working, self._steps = 0.0, 0

    def note(self, report: StepReport) -> None:
        """Count a step, and write where a record is due. Collective over all ranks then."""
        run, time = self._run, report.time
        self._working += time.data + time.forward + time.backward + time.optimizer
        self._steps += 1
        if not run.config.logging.experts_are_due(report.step, run.config.steps):
            return
        mesh = run.mesh
        of_ranks = torch.zeros(2, mesh.world_size, dtype=torch.float64)
        of_ranks[:, mesh.rank] = torch.tensor([report.memory_bytes, self._working / self._steps], dtype=torch.float64)
        memory, working = all_reduce(of_ranks, mesh.world_group).tolist()
        loads = all_loads(run, self._before)
        if self._files:
            steps = {"step": report.step, "first_step": report.step - self._steps + 1}
            loads_file, ranks_file = self._files
            if loads:
                loads_file.append(steps | {"layers": {name: relative(load) for name, load in loads.items()}})
            ranks_file.append(steps | {"memory_bytes": [int(x) for x in memory], "working_seconds": working})
        self._before = {name: load.clone() for name, load in run.loads.items()}
        self._working, self._steps = 0.0, 0


def relative(load_E: Tensor) -> list[float]:
    """Each expert's tokens over the mean expert's, two decimals; all 0 without any."""
    mean = max(float(load_E.double().mean()), 1e-9)
    return [round(load / mean, 2) for load in load_E.tolist()]
