"""The GPU's pipeline benchmark on a CPU: the simulated all-to-all changes no bit, and its messages are measured."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.local_exchange import repeats_for_bandwidth
from benchmarks.pipeline_gpu import Step
from fp8moe.layers.dispatch import LocalDispatcher

CPU = torch.device("cpu")


def test_the_simulated_all_to_all_computes_what_one_rank_computes() -> None:
    step = Step(CPU, microbatches=3)
    sums = step(overlap=True)
    found = {name: p.main_grad.clone() for name, p in step.model.named_parameters()}  # type: ignore[attr-defined]
    assert torch.equal(step(overlap=False), sums)
    for block in step.model.blocks.values():
        block.moe.dispatcher = LocalDispatcher(step.config.experts.num_experts)  # type: ignore[union-attr]
    assert torch.equal(step(overlap=False), sums)
    for name, parameter in step.model.named_parameters():
        assert torch.equal(parameter.main_grad, found[name]), name  # type: ignore[attr-defined]
        assert found[name].abs().sum() > 0


def test_figures_and_the_size_of_a_message() -> None:
    step = Step(CPU, microbatches=2)
    figures = step.figures(overlap=True)
    assert figures.communication > 0 and figures.hidden is not None and 0 <= figures.hidden <= 1
    assert {"F attn", "F mlp", "B mlp", "W attn"} <= figures.phases.keys()
    rows = torch.zeros(10, 64, dtype=torch.bfloat16)
    assert step.dispatcher.bytes_of(rows) == 2 * 10 * 128  # two peers
    repeats = repeats_for_bandwidth(step.dispatcher, 1 << 16, 1e9, CPU)
    assert repeats >= 1 and repeats_for_bandwidth(step.dispatcher, 1 << 16, 1e6, CPU) > repeats


def test_it_runs_with_torch_triton_and_numpy_only(tmp_path: Path) -> None:
    """As a command, small, with the names of all other dependencies made unimportable."""
    script = (
        "import sys\n"
        "for name in ('hydra', 'omegaconf', 'yaml', 'tokenizers', 'tqdm', 'transformers', 'safetensors'):\n"
        "    sys.modules[name] = None\n"
        "from benchmarks.bench_pipeline import main\n"
        f"main(['--part', 'gpu', '--device', 'cpu', '--quick', '--repeats', '2', '--warmup', '0',"
        f" '--json', {str(tmp_path / 'records.json')!r}])\n"
    )
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "GEMMs on 112 of 132 SMs" in done.stdout and (tmp_path / "records.json").exists()
    assert "communication hidden" in done.stdout
