"""fp8moe export: released names and bits back, FP8 codes of the training, loaded by transformers with equal logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Glm4MoeConfig, OlmoeConfig, Qwen3MoeConfig
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from fp8moe.cli.export_model import main as export
from fp8moe.cli.import_model import main as take
from fp8moe.errors import ConfigError
from fp8moe.interop.hf_dir import dequantized
from fp8moe.interop.readers import broken_rules
from fp8moe.interop.stored import Stored
from fp8moe.kernels.quantize import quantize_blocks
from fp8moe.layers.recipe import Precision
from tests.interop import released

SMALL = dict(num_hidden_layers=2, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2)


def loaded(folder: Path, dtype: torch.dtype = torch.float32):
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    return model.eval()


def same_bits(one: Path, other: Path) -> None:
    before, after = released.tensors_of(one), released.tensors_of(other)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name


@pytest.mark.parametrize(
    "name",
    [
        *("v3", "v3, yarn, no query latent", "v2, groups", "qwen3, three heads, dense in the middle"),
        *("glm4, biases, norms, half rotated", "olmoe", "gpt_oss, yarn, three heads"),
    ],
)
def test_fp32_comes_back_bit_equal_and_loads_in_transformers(name, tmp_path):
    theirs = released.write(released.CONFIGS[name], tmp_path / "hf")
    take([str(tmp_path / "hf"), str(tmp_path / "run")])
    assert export([str(tmp_path / "run"), str(tmp_path / "out"), "--precision", "fp32"]) == 0
    same_bits(tmp_path / "hf", tmp_path / "out")
    ids = released.ids(theirs.config.vocab_size)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tmp_path / "out")(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


def test_bf16_with_mtp_comes_back_bit_equal(tmp_path, capsys):
    released.write(released.CONFIGS["v3"], tmp_path / "hf", torch.bfloat16)
    tensors = released.with_mtp(released.tensors_of(tmp_path / "hf"), 3)
    tensors |= {name: tensor.float() for name, tensor in tensors.items() if "correction_bias" in name}
    released.rewrite(tmp_path / "hf", tensors)
    take([str(tmp_path / "hf"), str(tmp_path / "run")])
    export([str(tmp_path / "run"), str(tmp_path / "out")])
    same_bits(tmp_path / "hf", tmp_path / "out")
    assert "the MTP module as layer 3" in capsys.readouterr().out
    before, after = (json.loads((tmp_path / one / "config.json").read_text()) for one in ("hf", "out"))
    for key in before.keys() & after.keys():
        assert before[key] == after[key], key
    assert after["topk_method"] == "noaux_tc" and after["num_nextn_predict_layers"] == 1
    export([str(tmp_path / "run"), str(tmp_path / "without"), "--mtp", "drop"])
    assert released.tensors_of(tmp_path / "without").keys() == {
        n for n in tensors if not n.startswith("model.layers.3.")
    }


def test_fp8_codes_come_back_bit_equal_and_are_those_of_the_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fp8moe.interop.export_hf.CHUNK", 128 * 128)  # bands of one block of rows
    released.write(released.ALIGNED, tmp_path / "hf", torch.bfloat16)
    before = released.in_block_fp8(released.with_mtp(released.tensors_of(tmp_path / "hf"), 2))
    released.rewrite(tmp_path / "hf", before, quantization_config=released.QUANTIZATION)
    take([str(tmp_path / "hf"), str(tmp_path / "run")])
    export([str(tmp_path / "run"), str(tmp_path / "out"), "--precision", "fp8"])
    after = released.tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if name.endswith("_scale_inv"):
            torch.testing.assert_close(after[name], tensor, rtol=2**-8, atol=0)
        else:
            assert tensor.dtype == after[name].dtype, name
            assert torch.equal(tensor.float(), after[name].float()), name
    model = released.imported(tmp_path / "run", Precision.FP8)
    joined = quantize_blocks(model.block(0).attn.qkv_a.weight.detach())[0]
    parts = [f"model.layers.0.self_attn.{name}.weight" for name in ("q_a_proj", "kv_a_proj_with_mqa")]
    assert torch.equal(torch.cat([after[name].float() for name in parts]), joined.data.float())
    assert torch.equal(torch.cat([after[f"{name}_scale_inv"] for name in parts]), joined.scale)
    assert "blocks of their own" not in capsys.readouterr().out


HEADS = dict(hidden_size=128, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=2)
GROUPED = {
    "qwen3": Qwen3MoeConfig(**released.QWEN3 | HEADS | dict(moe_intermediate_size=128, head_dim=128)),
    "glm4": Glm4MoeConfig(
        **released.GLM4 | HEADS | dict(moe_intermediate_size=128, head_dim=128, rope_parameters=released.HALF)
    ),
    "olmoe": OlmoeConfig(**released.OLMOE | HEADS | dict(intermediate_size=128, rms_norm_eps=1e-5)),
    "rows that change blocks": Qwen3MoeConfig(**released.QWEN3 | HEADS | dict(moe_intermediate_size=128, head_dim=192)),
}


@pytest.mark.parametrize("name", GROUPED)
def test_fp8_of_heads_in_the_readers_order_is_the_weight(name, tmp_path, capsys):
    """q and k have their rows in another order here; codes are the training's where a row stays in its block."""
    released.write(GROUPED[name], tmp_path / "hf", torch.bfloat16)
    take([str(tmp_path / "hf"), str(tmp_path / "run")])
    export([str(tmp_path / "run"), str(tmp_path / "out"), "--precision", "fp8"])
    before, after = released.tensors_of(tmp_path / "hf"), released.tensors_of(tmp_path / "out")
    theirs = "model.layers.1.self_attn.{}_proj.weight"
    assert all(after[theirs.format(one)].dtype is torch.float8_e4m3fn for one in "qkvo")
    for one in "qkvo":
        weight, codes = before[theirs.format(one)].float(), after[theirs.format(one)].float()
        scale = after[theirs.format(one) + "_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
        scale = scale[: len(weight), : weight.shape[1]]
        bound = weight.abs() * 2**-4 * 1.001 + scale * 2**-10  # half a step of E4M3, normal or subnormal
        assert ((codes * scale - weight).abs() <= bound).all(), one
    said = capsys.readouterr().out
    if name == "rows that change blocks":
        assert "their rows change blocks" in said and theirs.format("q") in said
        return
    assert "their rows change blocks" not in said
    blocks = quantize_blocks(released.imported(tmp_path / "run", Precision.FP8).block(1).attn.qkv.weight.detach())[0]
    for one, ours in zip("qkv", blocks.data.float().chunk(3), strict=True):
        assert torch.equal(after[theirs.format(one)].float().sort(0).values, ours.sort(0).values), one


@pytest.mark.parametrize("factor", [1.0, 1.3, None])  # times amax/448; None: the power of two above
def test_at_other_scales_than_amax_by_448_values_move_by_one_step_at_most_and_that_is_said(factor, tmp_path, capsys):
    released.write(released.ALIGNED, tmp_path / "hf")  # FP32: an amax that BF16 rounds
    before = released.in_block_fp8(released.tensors_of(tmp_path / "hf"), factor)
    released.rewrite(tmp_path / "hf", before, quantization_config=released.QUANTIZATION)
    take([str(tmp_path / "hf"), str(tmp_path / "run")])
    capsys.readouterr()
    export([str(tmp_path / "run"), str(tmp_path / "out"), "--precision", "fp8"])
    said, after, anew = capsys.readouterr().out, released.tensors_of(tmp_path / "out"), []
    for name in sorted(name for name in before if name + "_scale_inv" in before):
        was, now = (dequantized(one[name], one[name + "_scale_inv"]) for one in (before, after))
        scale = dequantized(torch.ones(now.shape, dtype=torch.float8_e4m3fn), after[name + "_scale_inv"])
        exponent = torch.frexp((now / scale).abs().clamp(min=2**-6)).exponent
        assert ((now - was).abs() <= torch.exp2(exponent - 4.0) * scale).all(), name  # 3 bits of mantissa
        if not torch.allclose(now, was, rtol=2**-8, atol=0):
            anew.append(name)
    assert bool(anew) == (factor != 1.0) == ("quantized anew" in said)
    if anew:
        assert f"{len(anew)} weights are quantized anew, {anew[0]} the first" in said


def test_transformers_dequantizes_an_aligned_export_as_an_import_does(tmp_path):
    released.write(released.ALIGNED, tmp_path / "hf")
    take([str(tmp_path / "hf"), str(tmp_path / "run")])
    export([str(tmp_path / "run"), str(tmp_path / "out"), "--precision", "fp8", "--for", "transformers"])
    take([str(tmp_path / "out"), str(tmp_path / "again")])
    tensors, theirs = released.tensors_of(tmp_path / "out"), Fp8Dequantize(None)
    export([str(tmp_path / "again"), str(tmp_path / "wide"), "--precision", "fp32"])
    wide = released.tensors_of(tmp_path / "wide")
    quantized = [name for name in tensors if name + "_scale_inv" in tensors]
    assert len(quantized) == 2 * 5 + 3 + 3 + 3 * 8
    for name in quantized:
        values = theirs._dequantize_one(tensors[name], tensors[name + "_scale_inv"], torch.float32)
        assert torch.equal(values, wide[name]), name


def test_fp8_of_aligned_widths_in_transformers_is_ours_on_the_same_codes(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed: pip install accelerate runs this")
    released.write(released.ALIGNED, tmp_path / "hf")
    take([str(tmp_path / "hf"), str(tmp_path / "run")])
    export([str(tmp_path / "run"), str(tmp_path / "out"), "--precision", "fp8", "--for", "transformers"])
    take([str(tmp_path / "out"), str(tmp_path / "again")])
    theirs, ids = loaded(tmp_path / "out", torch.float32).float(), released.ids(96)
    with torch.no_grad():
        ours = released.imported(tmp_path / "again").logits(ids)
        torch.testing.assert_close(theirs(ids).logits, ours, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("reader", ["vllm", "transformers"])
def test_what_stays_bf16_is_listed_and_said(reader, tmp_path, capsys):
    sizes = released.V3 | SMALL | dict(
        hidden_size=128, intermediate_size=208, moe_intermediate_size=128, kv_lora_rank=128, q_lora_rank=128,
        v_head_dim=32, num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    released.write(type(released.ALIGNED)(**sizes), tmp_path / "hf")
    take([str(tmp_path / "hf"), str(tmp_path / "run")])
    export([str(tmp_path / "run"), str(tmp_path / "out"), "--precision", "fp8", "--for", reader])
    said = capsys.readouterr().out
    tensors = released.tensors_of(tmp_path / "out")
    listed = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    dense = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert {*dense, "lm_head", "model.layers.1.mlp.gate"} <= set(listed)
    assert all(tensors[f"{name}.weight"].dtype is torch.bfloat16 for name in dense)
    assert "gate_proj in its merged layer has 208 rows" in said or "208 rows are no multiple of 128, which tran" in said
    kv_a = "model.layers.0.self_attn.kv_a_proj_with_mqa"  # 144 rows
    assert (kv_a in listed) == (reader == "transformers")
    assert f"for {reader}: " in said and list(broken_rules(tmp_path / "out")) == []


def test_a_seam_within_a_block_is_said_by_name(tmp_path, capsys):
    sizes = released.V3 | SMALL | dict(
        q_lora_rank=None, hidden_size=128, num_attention_heads=3, num_key_value_heads=3, qk_nope_head_dim=32,
        intermediate_size=256, moe_intermediate_size=128, kv_lora_rank=128, v_head_dim=128,
    )  # fmt: skip
    released.write(type(released.ALIGNED)(**sizes), tmp_path / "hf")
    take([str(tmp_path / "hf"), str(tmp_path / "run")])
    export([str(tmp_path / "run"), str(tmp_path / "out"), "--precision", "fp8"])
    assert "model.layers.0.self_attn.q_proj.weight, model.layers.0.self_attn.kv_a_proj_with_mqa.weight" in (
        capsys.readouterr().out
    )
    assert list(broken_rules(tmp_path / "out")) == []


def test_shards_of_bounded_size_with_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr("fp8moe.interop.export_hf.SHARD", 60_000)
    theirs = released.write(released.CONFIGS["v2, greedy"], tmp_path / "hf")
    take([str(tmp_path / "hf"), str(tmp_path / "run")])
    export([str(tmp_path / "run"), str(tmp_path / "out"), "--precision", "fp32"])
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3 and all(path.stat().st_size < 70_000 for path in shards)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == released.tensors_of(tmp_path / "out").keys()
    ids = released.ids(96)
    with torch.no_grad():
        assert torch.equal(loaded(tmp_path / "out")(ids).logits, theirs(ids).logits)


def test_any_range_of_a_stored_tensor_is_the_same_values(tmp_path):
    released.write(released.CONFIGS["v3"], tmp_path / "hf")
    take([str(tmp_path / "hf"), str(tmp_path / "run")])
    stored = Stored(tmp_path / "run" / "checkpoints" / "step-0")
    name = "master.blocks.1.moe.experts.gate_up.weight"  # in 16 parts
    whole, generator = stored.read(name, 0, 8 * 96 * 64), torch.Generator().manual_seed(0)
    assert not whole.isnan().any()
    for _ in range(20):
        first, end = sorted(torch.randint(len(whole) + 1, (2,), generator=generator).tolist())
        assert torch.equal(stored.read(name, first, end - first), whole[first:end])


def test_files_are_taken_along_and_the_card_says_how_it_was_trained(tmp_path):
    released.write(released.CONFIGS["v3"], tmp_path / "hf")
    released.change(tmp_path / "hf", eos_token_id=7, bos_token_id=None)
    for name, text in (("tokenizer_config.json", '{"a": 1}'), ("generation_config.json", '{"top_p": 0.9}')):
        (tmp_path / "hf" / name).write_text(text)
    take([str(tmp_path / "hf"), str(tmp_path / "run")])
    export([str(tmp_path / "run" / "checkpoints" / "step-0"), str(tmp_path / "out")])
    out = tmp_path / "out"
    assert (out / "tokenizer_config.json").read_text() == '{"a": 1}'
    assert json.loads((out / "generation_config.json").read_text()) == {"top_p": 0.9}
    config = json.loads((out / "config.json").read_text())
    assert config["eos_token_id"] == 7 and config["bos_token_id"] is None
    assert {"rope_theta", "rope_scaling", "scoring_func"} <= config.keys() and "rope_parameters" not in config
    assert "| begun from | hf |" in (out / "README.md").read_text()


def test_what_can_not_be_written(tmp_path):
    released.write(released.CONFIGS["v2, greedy"], tmp_path / "hf")
    take([str(tmp_path / "hf"), str(tmp_path / "run")])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(ConfigError, match="exists and is not an empty directory"):
        export([str(tmp_path / "run"), str(tmp_path / "out")])
    with pytest.raises(ConfigError, match="holds no average of the weights, which --ema asks for"):
        export([str(tmp_path / "run"), str(tmp_path / "other"), "--ema"])
    with pytest.raises(
        ConfigError, match=r"no weight of this model can be FP8 \(its 64 inputs are no multiple of 128\)"
    ):
        export([str(tmp_path / "run"), str(tmp_path / "other"), "--precision", "fp8"])
    with pytest.raises(ConfigError, match="is a Hugging Face directory, not a checkpoint"):
        export([str(tmp_path / "hf"), str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()
