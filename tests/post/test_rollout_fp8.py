"""Rollouts by a server that has FP8 exports of a run: they are its weights to FP8 rounding, and training goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from fp8moe.cli.compose import as_yaml
from fp8moe.cli.grpo import export_weights
from fp8moe.generate.text import Vocabulary
from fp8moe.interop.hf_model import open_model
from fp8moe.interop.stored import Stored
from fp8moe.train.json_lines import read_lines
from fp8moe.train.loop import train
from tests.interop import released
from tests.post.rollouts_served import config_of, method, rollouts_served
from tests.post.runs import policy_config

WIDE = (
    *("model.dim=128", "model.dense_hidden=256", "model.attention.q_lora_rank=128", "model.attention.kv_lora_rank=128"),
    *("model.attention.num_heads=4", "model.attention.nope_dim=32", "model.attention.rope_dim=128"),
    *("model.attention.v_dim=32", "model.experts.hidden=128", "steps=2", "grpo.max_tokens=4", "grpo.prompts=2"),
    *("batch.sequences=16", "batch.micro_batch=4", "grpo.train_count=8", "grpo.kl=0"),
)
SCALE = "_scale_inv"


def by_hand(folder: Path) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Of each stored tensor, its values by the published rule, code x scale of its block of 128 x 128, and the scale of
    each value; None where it is stored wide."""
    tensors, found = released.tensors_of(folder), {}
    for name, tensor in tensors.items():
        if name.endswith(SCALE):
            continue
        scale = None
        if name + SCALE in tensors:
            assert tensor.dtype is torch.float8_e4m3fn and tensors[name + SCALE].dtype is torch.float32
            scale = torch.kron(tensors[name + SCALE], torch.ones(128, 128))[: len(tensor), : tensor.shape[1]]
        found[name] = tensor.float() if scale is None else tensor.float() * scale, scale
    return found


def load(path: str) -> Any:
    """The model of an FP8 directory in FP32, by transformers: which reads block FP8 itself where accelerate is."""
    wide = Path(path).with_name("wide")
    shutil.copytree(path, wide)
    config = json.loads((wide / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert quantization["quant_method"] == "fp8" and quantization["weight_block_size"] == [128, 128]
    (wide / "config.json").write_text(json.dumps(config))
    released.rewrite(wide, {name: values.contiguous() for name, (values, _) in by_hand(Path(path)).items()})
    model = AutoModelForCausalLM.from_pretrained(wide, dtype=torch.float32).eval()
    shutil.rmtree(wide)
    return model


def test_a_run_by_fp8_exports(corpus: list[str], tmp_path: Path) -> None:
    plain = policy_config(corpus, *WIDE)
    assert plain.data.tokenizer is not None
    num_ids = Vocabulary(Path(plain.data.tokenizer), plain.model.vocab_size).num_ids
    with rollouts_served(plain, num_ids) as (endpoint, rollouts):
        rollouts.load = load
        config = config_of(corpus, endpoint.url, *WIDE, "grpo.refresh_precision=fp8", f"run_dir={tmp_path / 'run'}")
        train(config, as_yaml, method=method())
    assert [Path(path).name for path in rollouts.told] == ["0", "1", "2"] and len(rollouts.asked) == 2 * 8 + 2 * 2
    for one in read_lines(tmp_path / "run" / "metrics.jsonl")[0]:
        assert 1e-5 < one["mismatch_largest"] < 0.5, "FP8 weights there, FP32 weights here"
        assert one["grad_norm"] > 0 and one["reward_failures"] == 0
    exported, stored = tmp_path / "run" / "rollout_weights" / "2", Stored(tmp_path / "run" / "checkpoints" / "step-2")
    export_weights(tmp_path / "run" / "checkpoints" / "step-2", tmp_path / "run", tmp_path / "fp32", "fp32")
    weights, stored_fp8 = released.tensors_of(tmp_path / "fp32"), by_hand(exported)
    assert stored_fp8.keys() == weights.keys()
    quantized = {name for name, (_, scale) in stored_fp8.items() if scale is not None}
    assert quantized == {name for name in weights if name.endswith("_proj.weight") or "kv_a_proj" in name}
    for name, (values, scale) in stored_fp8.items():
        in_bf16 = weights[name].bfloat16().float()
        if scale is None:
            assert torch.equal(values, in_bf16), name
            continue
        bound = weights[name].abs() * 2**-4 * 1.001 + scale * 2**-10  # half a step of E4M3, normal or subnormal
        assert ((values - weights[name]).abs() <= bound).all() and not torch.equal(values, in_bf16), name
    ours = open_model(exported)
    for name in ours.parameters:
        count = stored.length(name)
        assert count is not None
        values = torch.full((count,), float("nan"))
        ours.fill(name, 0, values)
        master = stored.read(name, 0, count)
        assert ((values - master).abs() <= master.abs() * 2**-4 * 1.001 + master.abs().max() / 448 * 2**-10).all(), name
