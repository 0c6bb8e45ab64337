"""Training on this GPU, whole commands under torchrun: it runs, no two streams race, losses are one CPU process's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from fp8moe.cli.compose import as_yaml
from fp8moe.cli.generate import main as generate
from fp8moe.train.loop import train
from tests.train.runs import SMALL, configured, write_corpus

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
CALM = ("report=false", "validation.completions=0", "steps=3", "parallel.timeout=60")


def run_there(processes: int, library: Path, command: Sequence[str], report: Path) -> str:
    """What `fp8moe COMMAND` says on so many GPUs, each rank's report in the folder `report`."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    command = [sys.executable, *torchrun, "-m", "tests.host_gpu", str(library), *command, "device=cuda"]
    done = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT | {"HOST_GPU_REPORT": str(report)}, capture_output=True, text=True,
        timeout=200, check=False, errors="replace",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-4000:]
    return done.stdout


def losses(run_dir: Path) -> list[float]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "val_loss", "val_loss_ema")
    return [record[name] for record in records for name in names if record.get(name) is not None]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The settings of a small run that trains and validates, with the MTP module and without a device."""
    corpus = write_corpus(tmp_path_factory.mktemp("corpus"))
    return (*corpus, *(one for one in SMALL if not one.startswith(("device=", "steps="))), *CALM)


LAYOUTS = {
    "experts, messages of a fixed size in chunks, overlapped, averaged weights": (2, (
        "parallel.ep=2", "parallel.schedule=dualpipev", "parallel.chunks=2", "parallel.capacity_factor=4",
        "ema.decay=0.9", "validation.ema=true", "validation.every=1", "checkpoint.every=1", "precision=fp8",
    )),
    "a pipeline both ways": (2, (
        "parallel.pp=2", "parallel.ep=1", "parallel.schedule=dualpipe", "model.num_layers=4", "validation.every=2",
        "checkpoint.every=1", "precision=fp32", "batch.micro_batch=1",
    )),
    "two hops, documents apart": (4, (
        "parallel.ep=4", "parallel.dispatcher=node_limited", "parallel.ranks_per_node=2", "precision=bf16",
        "data.packing=documents", "data.document_mask=true",
    )),
    "matrices on their owners, sequences shared": (2, (
        "parallel.ep=1", "parallel.cp=2", "optimizer=muon", "precision=fp8", "validation.every=1",
    )),
}  # fmt: skip
# Messages with products under them, at least: 102 of the first layout's 144, validation's included, 38 of 52 of the two
# hops, which have no pairs, all 36 of the shared sequences. A thread of the host that waits for the device meanwhile,
# as those of EMA and of checkpoints do, orders a few more.
UNDER = {
    "experts, messages of a fixed size in chunks, overlapped, averaged weights": 84,
    "two hops, documents apart": 36,
    "matrices on their owners, sequences shared": 24,
}
NEAR = {"fp32": 1e-5, "bf16": 5e-3, "fp8": 5e-3}


@pytest.mark.parametrize("name", LAYOUTS)
def test_training_runs_without_races_and_as_on_the_host(
    name: str, library: Path, small: tuple[str, ...], tmp_path: Path
) -> None:
    processes, settings = LAYOUTS[name]
    there, here = tmp_path / "gpu", tmp_path / "cpu"
    run_there(processes, library, ("train", *small, *settings, f"run_dir={there}"), tmp_path)
    for rank in range(processes):
        report = json.loads((tmp_path / f"{rank}.json").read_text())
        assert report["found"] == []
        assert sum(count > 0 for count in report["under_messages"]) >= UNDER.get(name, 0)
        assert report["without"]["wait"], "races where no stream waits"
        assert report["without"]["record_stream"], "memory that goes back too early where nobody says who uses it"
    alone = (one for one in settings if not one.startswith("parallel."))
    train(configured(list(small), *alone, "steps=3", f"run_dir={here}"), as_yaml)
    (precision,) = (one.partition("=")[2] for one in settings if one.startswith("precision="))
    assert losses(there) == pytest.approx(losses(here), rel=NEAR[precision])


def test_graphs_train_and_generate_as_the_host_does(
    library: Path, small: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A micro-batch as graphs between its messages to experts; then forwards of two tokens of each text. What the host
    may take no part in, it does not: the device refuses it."""
    there, here = tmp_path / "gpu", tmp_path / "cpu"
    graphs = ("parallel.ep=2", "parallel.capacity_factor=4", "parallel.cuda_graphs=true")
    of_both = ("precision=fp8", "batch.micro_batch=2", "checkpoint.every=3")
    run_there(2, library, ("train", *small, *of_both, *graphs, f"run_dir={there}"), tmp_path)
    train(configured(list(small), *of_both, f"run_dir={here}"), as_yaml)
    assert losses(there) == pytest.approx(losses(here), rel=NEAR["fp8"])
    ask = (str(there), "--prompt", "the ", "--prompt", "a", "--max-tokens", "8", "precision=fp32")
    texts = run_there(2, library, ("generate", *ask, "--cuda-graphs", "--mtp", "parallel.ep=2"), tmp_path)
    assert all(json.loads((tmp_path / f"{rank}.json").read_text())["found"] == [] for rank in range(2))
    capsys.readouterr()
    assert generate([*ask, "device=cpu"]) == 0
    assert texts == capsys.readouterr().out
