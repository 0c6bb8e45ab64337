"""Directories that can't be imported: one sentence each, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fp8moe.cli.import_model import main
from fp8moe.errors import ConfigError, DataError
from fp8moe.interop.families import read_config
from fp8moe.train.checkpoint import below
from tests.interop import released

TOKENIZER = "tokenizer.json"


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    released.write(released.CONFIGS["v3"], folder, max_shard_size="100KB")
    return folder


@pytest.fixture
def hf(original, tmp_path) -> Path:
    folder = tmp_path / "hf"
    folder.mkdir()
    for path in original.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def refused(hf: Path, sentence: str, error: type[ValueError] = DataError, *options: str) -> None:
    out = hf.parent / "run"
    with pytest.raises(error) as raised:
        main([str(hf), str(out), *options])
    assert sentence in str(raised.value) and "\n" not in str(raised.value)
    assert not out.exists() and [path.name for path in hf.parent.iterdir()] == ["hf"]


def byte_level(size: int) -> str:
    vocabulary = {character: i for i, character in enumerate(pre_tokenizers.ByteLevel.alphabet()[: size - 1])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary | {"</s>": size - 1}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str()


def test_a_run_directory(hf):
    (hf / "config.json").rename(hf / "config.yaml")
    refused(hf, f"{hf} is a run directory and needs no import: begin from it with init_from={hf}", ConfigError)


def test_a_missing_shard(hf):
    shard = sorted(hf.glob("*.safetensors"))[1]
    shard.unlink()
    refused(hf, f"{shard} is missing: download it again")


def test_a_shard_that_is_cut_off(hf):
    shard = sorted(hf.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-8])
    refused(hf, f"{shard} is cut off or damaged")


def test_a_shard_without_what_the_index_has_in_it(hf):
    path = hf / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.0.self_attn.extra"] = sorted(hf.glob("*.safetensors"))[0].name
    path.write_text(json.dumps(index))
    refused(hf, "lacks model.layers.0.self_attn.extra, which model.safetensors.index.json has in it")
    index["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    path.write_text(json.dumps(index))
    refused(hf, "names '../elsewhere.safetensors', which is no file of its folder")


def test_several_shards_without_an_index(hf):
    (hf / "model.safetensors.index.json").unlink()
    refused(hf, "and no model.safetensors.index.json")


def test_pickles(hf):
    for path in hf.glob("*.safetensors*"):
        path.unlink()
    torch.save({}, hf / "pytorch_model.bin")
    refused(hf, "pytorch_model.bin, a pickle, which would run what it says: use safetensors", ConfigError)
    (hf / "pytorch_model.bin").unlink()
    refused(hf, "has no safetensors files")


def test_config_json_that_is_none(hf):
    (hf / "config.json").write_text("{")
    refused(hf, "it is not JSON")
    (hf / "config.json").unlink()
    refused(hf, "No such file")


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"model_type": "llama"}, "model_type='llama' is not supported: use one of deepseek_v3"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True is not supported, the tie of embedding and head"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, another activation of the experts would be lost"),
        ({"attention_bias": True}, "the biases of attention would be lost: use false"),
        ({"rope_interleave": False}, "the rotation in halves would be lost"),
        ({"scoring_func": "softmax"}, "another score of experts would be lost: use sigmoid"),
        ({"topk_method": "greedy"}, "another choice of experts would be lost: use noaux_tc"),
        ({"num_key_value_heads": 2}, "heads that share keys and values would be lost: use 4"),
        ({"attention_dropout": 0.1}, "dropout of attention would be lost"),
        ({"moe_layer_freq": 2}, "dense layers between those with experts would be lost"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_type='llama3' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 8.0, "attention_factor": 2.0}}, "attention_factor=2.0"),
        ({"sliding_window": 128}, "sliding_window=128 is not supported for model_type=deepseek_v3"),
        ({"kv_lora_rank": ...}, "lacks kv_lora_rank, which this family needs"),
        ({"kv_lora_rank": "32"}, "kv_lora_rank='32' must be a number"),
        ({"seq_aux": False, "aux_loss_alpha": 0.1}, "the balance loss over a whole batch would be lost"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method='gptq' is not supported"),
        ({"quantization_config": {"quant_method": "fp8"}}, "weight_block_size=None is not supported"),
    ],
)  # fmt: skip
def test_keys_that_are_not_supported(keys, sentence, hf):
    released.change(hf, **keys)
    refused(hf, sentence, ConfigError)


def test_keys_without_effect_are_read_over(hf):
    released.change(hf, transformers_version="9", use_cache=False, ep_size=4, sliding_window=None, mlp_bias=False)
    assert main([str(hf), str(hf.parent / "run")]) == 0


def test_tensors_that_are_missing_unknown_or_of_another_shape(hf):
    tensors = released.tensors_of(hf)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    released.rewrite(hf, {key: value for key, value in tensors.items() if key != name})
    refused(hf, f"lacks 1 of the {len(tensors)} tensors of its model, the first is {name}")
    released.rewrite(hf, tensors | {"model.layers.0.self_attn.q_b_proj.bias": torch.zeros(3)})
    refused(hf, "1 tensors that deepseek_v3 has no place for, the first is model.layers.0.self_attn.q_b_proj.bias")
    released.rewrite(hf, tensors | {name: torch.zeros(48, 32)})
    refused(hf, f"{name} is [48, 32] and config.json makes it [48, 64]")
    released.rewrite(hf, tensors | {name: torch.zeros(48, 64, dtype=torch.int8)})
    refused(hf, f"{name} is I8, which is not supported: use weights in BF16")


def test_a_scale_grid_that_does_not_fit(hf):
    tensors = released.in_block_fp8(released.tensors_of(hf))
    scale = "model.layers.0.mlp.up_proj.weight_scale_inv"
    fp8 = {"quantization_config": released.QUANTIZATION}
    released.rewrite(hf, tensors | {scale: torch.ones(2, 1)}, **fp8)
    refused(hf, f"{scale} is F32 [2, 1] and [96, 64] in blocks of 128 needs F32 [1, 1]")
    released.rewrite(hf, {key: value for key, value in tensors.items() if key != scale}, **fp8)
    refused(hf, f"is FP8 and {scale} is missing")


def test_an_mtp_head_of_its_own(hf):
    tensors = released.with_mtp(released.tensors_of(hf), 3)
    tensors["model.layers.3.shared_head.head.weight"][5, 5] += 1
    released.rewrite(hf, tensors)
    refused(hf, "shared_head.head.weight differs from lm_head.weight, which the MTP module shares here")
    assert main([str(hf), str(hf.parent / "run"), "--mtp", "drop"]) == 0


def test_mtp_that_is_asked_for_and_absent(hf):
    refused(hf, "--mtp keep and", ConfigError, "--mtp", "keep")


def test_a_tokenizer_with_more_entries_than_the_vocabulary(hf):
    (hf / TOKENIZER).write_text(byte_level(98))
    refused(hf, "has ids up to 97 and the model's vocabulary has 96 entries")


def test_a_tokenizer_is_taken_along_and_kept_unchanged(hf, capsys):
    (hf / TOKENIZER).write_text(byte_level(96))
    (hf / "tokenizer_config.json").write_text('{"bos_token": null}')
    main([str(hf), str(hf.parent / "run")])
    assert "tokenizer.json of 96 ids is taken along" in capsys.readouterr().out
    for copy in ("tokenizer.json", "huggingface/tokenizer.json"):
        assert (hf.parent / "run" / copy).read_bytes() == (hf / TOKENIZER).read_bytes()
    assert (hf.parent / "run" / "huggingface" / "tokenizer_config.json").read_text() == '{"bos_token": null}'


def test_a_tokenizer_that_needs_remote_code_is_copied_and_not_executed(hf, capsys):
    marker = hf.parent.parent / "executed"
    (hf / "tokenization_mine.py").write_text(f"open({str(marker)!r}, 'w')\n")
    (hf / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", null]}}')
    main([str(hf), str(hf.parent / "run")])
    assert "copied and not used" in capsys.readouterr().out and not marker.exists()
    assert (hf.parent / "run" / "huggingface" / "tokenization_mine.py").is_file()


def test_nothing_is_overwritten(hf):
    out = hf.parent / "run"
    out.mkdir()
    (out / "mine").write_text("precious")
    with pytest.raises(ConfigError, match="exists and is not an empty directory"):
        main([str(hf), str(out)])
    assert (out / "mine").read_text() == "precious"
    (out / "mine").unlink()
    assert main([str(hf), str(out)]) == 0 and below(out)


def test_a_number_that_divides_is_at_least_one(tmp_path: Path) -> None:
    values = json.loads((Path(__file__).parent / "config_json" / "qwen3_30b_a3b.json").read_text())
    for key in ("num_attention_heads", "decoder_sparse_step"):
        (tmp_path / "config.json").write_text(json.dumps(values | {key: 0}))
        with pytest.raises(ConfigError, match=rf"{key}=0 must be at least 1: use the released file$"):
            read_config(tmp_path)
