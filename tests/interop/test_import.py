"""fp8moe import: released models become run directories with the same logits, and nothing is skipped in silence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fp8moe.cli.import_model import main
from fp8moe.interop.hf_model import open_model
from fp8moe.train.checkpoint import below, problems
from tests.interop import released


def logits_agree(theirs, run: Path, bound: float = 1e-4) -> None:
    ids = released.ids(theirs.config.vocab_size)
    ours = released.imported(run)
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ids), theirs(ids).logits, rtol=bound, atol=bound)


@pytest.mark.parametrize("name", released.CONFIGS)
def test_logits_equal_those_of_transformers(name, tmp_path, capsys):
    theirs = released.write(released.CONFIGS[name], tmp_path / "hf")
    assert main([str(tmp_path / "hf"), str(tmp_path / "run")]) == 0
    logits_agree(theirs, tmp_path / "run")
    assert "no tokenizer.json" in capsys.readouterr().out
    (path,) = below(tmp_path / "run")
    assert path.name == "step-0" and problems(path) == []


def test_shards_fused_experts_and_legacy_keys_give_the_same(tmp_path, capsys):
    theirs = released.write(released.CONFIGS["v3, yarn, no query latent"], tmp_path / "hf", max_shard_size="100KB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").is_file()
    main([str(tmp_path / "hf"), str(tmp_path / "shards")])
    logits_agree(theirs, tmp_path / "shards")
    yarn = {key: value for key, value in released.YARN.items() if key not in ("rope_type", "rope_theta")}
    legacy = dict(rope_parameters=..., rope_theta=10000.0, rope_scaling=yarn | {"type": "yarn"})
    released.rewrite(tmp_path / "hf", theirs.state_dict(), **legacy)
    main([str(tmp_path / "hf"), str(tmp_path / "fused")])
    logits_agree(theirs, tmp_path / "fused")


def test_block_fp8_with_unaligned_edges_is_codes_times_scales(tmp_path):
    theirs = released.write(released.WIDE, tmp_path / "hf")
    quantized = released.in_block_fp8(released.tensors_of(tmp_path / "hf"))
    assert quantized["model.layers.0.mlp.up_proj.weight_scale_inv"].shape == (2, 2)
    released.rewrite(tmp_path / "hf", quantized, quantization_config=released.QUANTIZATION)
    main([str(tmp_path / "hf"), str(tmp_path / "run")])
    wide = {n: t.float() for n, t in quantized.items() if not n.endswith("_scale_inv")}
    for name in [n for n in wide if n + "_scale_inv" in quantized]:
        scale = quantized[name + "_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
        wide[name] = wide[name] * scale[: wide[name].shape[0], : wide[name].shape[1]]
    released.rewrite(tmp_path / "hf", wide, quantization_config=...)
    again = type(theirs).from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    logits_agree(again, tmp_path / "run")


@pytest.mark.parametrize(("choice", "depth"), [("auto", 1), ("keep", 1), ("drop", 0)])
def test_mtp_in_or_out(choice, depth, tmp_path, capsys):
    theirs = released.write(released.CONFIGS["v3"], tmp_path / "hf")
    released.rewrite(tmp_path / "hf", released.with_mtp(released.tensors_of(tmp_path / "hf"), 3))
    main([str(tmp_path / "hf"), str(tmp_path / "run"), "--mtp", choice])
    logits_agree(theirs, tmp_path / "run")
    (path,) = below(tmp_path / "run")
    state = json.loads((path / "state.json").read_text())
    assert state["model"]["mtp_depth"] == depth
    said = capsys.readouterr().out
    assert ("a copy of lm_head.weight" in said) == bool(depth)
    assert ("the MTP module of layer 3" in said) == (not depth)


def test_mtp_that_is_announced_and_absent_is_left_out_and_said(tmp_path, capsys):
    released.write(released.CONFIGS["v3"], tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["num_nextn_predict_layers"] == 1
    main([str(tmp_path / "hf"), str(tmp_path / "run")])
    assert "announces an MTP module, the files hold none: it is left out" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["v3", "block FP8", "gpt_oss"])
def test_any_range_of_a_parameter_is_the_same_values(name, tmp_path, monkeypatch):
    released.write(released.CONFIGS.get(name, released.WIDE), tmp_path / "hf")
    if name == "block FP8":
        tensors = released.in_block_fp8(released.tensors_of(tmp_path / "hf"))
        released.rewrite(tmp_path / "hf", tensors, quantization_config=released.QUANTIZATION)
    model = open_model(tmp_path / "hf")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.parameters.items():
        monkeypatch.setattr("fp8moe.interop.hf_model.CHUNK", 1 << 24)
        whole = torch.full((parameter.length,), float("nan"))
        model.fill(name, 0, whole)
        assert not whole.isnan().any()
        monkeypatch.setattr("fp8moe.interop.hf_model.CHUNK", 3000)
        for _ in range(4):
            first, end = sorted(torch.randint(parameter.length + 1, (2,), generator=generator).tolist())
            out = torch.full((end - first,), float("nan"))
            model.fill(name, first, out)
            assert torch.equal(out, whole[first:end])


def test_bytes_of_all_parameters_are_the_directory(tmp_path):
    released.write(released.CONFIGS["v2, groups"], tmp_path / "hf", torch.bfloat16)
    model = open_model(tmp_path / "hf")
    read = sum(model.bytes_of(name, 0, one.length) for name, one in model.parameters.items())
    assert read == model.directory.num_bytes
    assert model.bytes_of("master.head.weight", 10, 30) == 40
