"""Host memory of an import: the largest tensor and a constant, however large the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from fp8moe.interop import deepseek
from fp8moe.interop.import_run import MOST_MEMORY
from fp8moe.interop.reader_names import expected
from fp8moe.model.config import ModelConfig
from tests.model.shapes import model_config

RUN = """
import os, sys, threading, time
_, hf, run, out = sys.argv
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

watcher = threading.Thread(target=watch)
watcher.start()
for command in (lambda: main([hf, run]), lambda: export([run, out])):
    before = peak[0] = resident()
    command()
    print("peak", peak[0] - before)
done.set()
watcher.join()
"""


def peaks(folder: Path) -> tuple[int, int]:
    """Bytes by which a process grows while it imports, and while it exports what it imported."""
    names = [str(folder / name) for name in ("hf", "run", "out")]
    done = subprocess.run([sys.executable, "-c", RUN, *names], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    took, gave = (int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("peak "))
    return took, gave


def write_zeros(folder: Path, model: ModelConfig) -> int:
    """A released model of zeros in BF16, a shard a layer -> its bytes."""
    folder.mkdir()
    values = deepseek.write_v3(model) | {"model_type": "deepseek_v3"}
    (folder / "config.json").write_text(json.dumps(values))
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, shape in expected(values).items():
        dtype = torch.float32 if "correction_bias" in name else torch.bfloat16
        shards.setdefault(name.split(".")[2] if ".layers." in name else "ends", {})[name] = torch.zeros(
            shape, dtype=dtype
        )
    index = {}
    for shard, tensors in shards.items():
        save_file(tensors, folder / f"{shard}.safetensors")
        index |= dict.fromkeys(tensors, f"{shard}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_import_and_export_hold_the_largest_tensor_and_a_constant(tmp_path: Path) -> None:
    model = model_config(
        vocab_size=16384, dim=512, num_layers=5, num_dense_layers=1, num_heads=4, q_lora_rank=32, kv_lora_rank=32,
        nope_dim=16, rope_dim=16, v_dim=16, dense_hidden=1024, expert_hidden=1024, num_experts=10, topk=3,
        num_shared_experts=1,
    )  # fmt: skip
    size = write_zeros(tmp_path / "hf", model)
    largest = 16384 * 512 * 4  # the embedding, in FP32
    took, gave = peaks(tmp_path)
    print(f"model {size / 1e6:.0f} MB in BF16, import {took / 1e6:.0f} MB, export {gave / 1e6:.0f} MB")
    assert 2 * size > largest + MOST_MEMORY, "the masters would not fit into what is allowed"
    assert took < largest + MOST_MEMORY and gave < largest + MOST_MEMORY
