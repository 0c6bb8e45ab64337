"""A state that moves through every kind of layout, loaded and saved at each, is the same at the end as at the start."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from fp8moe.train.run_state import save_checkpoint
from fp8moe.train.step import train_step
from tests.parallel.ranks import run_ranks
from tests.train.runs import built, configured, differing, joined, stored

SETTINGS = ("model.num_layers=4", "batch.sequences=8", "batch.micro_batch=1", "seq_len=16", "precision=bf16")
ONE = (1, ())
EP4, EP2 = (4, ("parallel.ep=4",)), (2, ("parallel.ep=2",))
REPLICAS = (2, ("parallel.ep=1",))  # ZeRO-1, as wherever there are replicas
EACH_ITS_OWN = (2, ("parallel.ep=1", "optimizer.sharding=none"))
PIPELINE = (2, ("parallel.pp=2", "parallel.schedule=zb1p"))
MIRRORED = (4, ("parallel.pp=2", "parallel.schedule=dualpipe", "parallel.ep=2"))
WAYS = [
    [EP4, EP2, ONE, EP4],
    [PIPELINE, ONE, PIPELINE],
    [REPLICAS, ONE, EACH_ITS_OWN, REPLICAS],
    [MIRRORED, ONE, MIRRORED],
]


def moved(settings: list[str], world_size: int, steps: int) -> dict[str, Tensor]:
    """Train some steps from the state that `settings` may name, save -> what this rank holds."""
    run = built(configured(settings, world_size=world_size))
    for _ in range(steps):
        train_step(run)
    save_checkpoint(run)
    return stored(run)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(
    "way", WAYS, ids=["ep 4-2-1-4", "pp 2-1-2", "dp 2-1-2, ZeRO-1 on and off", "DualPipe-1-DualPipe"]
)
def test_the_state_survives(
    corpus: list[str], tmp_path: Path, way: list[tuple[int, tuple[str, ...]]], optimizer: str
) -> None:
    first: dict[str, Tensor] | None = None
    came_from: list[str] = []
    for number, (world_size, layout) in enumerate(way):
        run_dir = tmp_path / str(number)
        settings = [*corpus, *SETTINGS, *layout, *came_from, f"run_dir={run_dir}", f"optimizer={optimizer}"]
        steps = 2 if number == 0 else 0
        ranks = (
            [moved(settings, 1, steps)]
            if world_size == 1
            else run_ranks(moved, world_size, settings, world_size, steps)
        )
        here = joined(ranks)
        first = first or here
        assert differing(first, here) == [], f"layout {number}: {layout}"
        came_from = [f"resume={run_dir / 'checkpoints' / 'step-2'}"]
    kind = "momentum" if optimizer == "muon" else "exp_avg"
    assert first is not None and all(values.any() for name, values in first.items() if name.startswith(kind))
