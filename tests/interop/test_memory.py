"""Host memory of an import: the largest tensor and a constant, however large the model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from transformers import DeepseekV3Config

from fp8moe.interop.import_run import MOST_MEMORY
from tests.interop import released

RUN = """
import os, sys, threading, time
from fp8moe.cli.import_model import main
from fp8moe.cli.export_model import main as export
import fp8moe.cli.compose, fp8moe.interop.hf_model, fp8moe.interop.import_run, fp8moe.interop.export_hf

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

peak, done = [0], threading.Event()
def watch():
    while not done.is_set():
        peak[0] = max(peak[0], resident())
        time.sleep(0.002)

before = resident()
watcher = threading.Thread(target=watch)
watcher.start()
{command}
done.set()
watcher.join()
print("peak", peak[0] - before)
"""


def peak(command: str) -> int:
    """Bytes by which a process grows while it does `command`."""
    done = subprocess.run(
        [sys.executable, "-c", RUN.format(command=command)], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.rpartition("peak ")[2])


def test_import_and_export_hold_the_largest_tensor_and_a_constant(tmp_path: Path) -> None:
    config = DeepseekV3Config(
        **released.V3 | dict(vocab_size=65536, hidden_size=512, intermediate_size=2048, moe_intermediate_size=512,
                             n_routed_experts=32, num_hidden_layers=12)
    )  # fmt: skip
    released.write(config, tmp_path / "hf", torch.bfloat16, max_shard_size="200MB")
    size = sum(path.stat().st_size for path in (tmp_path / "hf").glob("*.safetensors"))
    largest = 65536 * 512 * 4  # the embedding, in FP32
    took = peak(f"main([{str(tmp_path / 'hf')!r}, {str(tmp_path / 'run')!r}])")
    gave = peak(f"export([{str(tmp_path / 'run')!r}, {str(tmp_path / 'out')!r}])")
    print(f"model {size / 1e6:.0f} MB in BF16, import {took / 1e6:.0f} MB, export {gave / 1e6:.0f} MB")
    assert 2 * size > largest + MOST_MEMORY, "the masters would not fit into what is allowed"
    assert took < largest + MOST_MEMORY and gave < largest + MOST_MEMORY
