"""The rules of vLLM's and SGLang's loaders find each mistake that is planted in a sound export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fp8moe.cli.export_model import main as export
from fp8moe.cli.import_model import main as take
from fp8moe.errors import DataError
from fp8moe.interop import export_hf
from fp8moe.interop.readers import broken_rules, check_directory
from tests.interop import released

QUANTIZATION = "quantization_config"
LISTED = "modules_to_not_convert"
Change = Callable[[dict, dict[str, Tensor]], None]


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """An FP8 export with MTP, in one shard."""
    folder = tmp_path_factory.mktemp("sound")
    released.write(released.ALIGNED, folder / "hf")
    released.rewrite(folder / "hf", released.with_mtp(released.tensors_of(folder / "hf"), 2))
    take([str(folder / "hf"), str(folder / "run")])
    export([str(folder / "run"), str(folder / "out"), "--precision", "fp8"])
    return folder / "out"


def broken(sound: Path, folder: Path, change: Change) -> list[str]:
    """What the rules say of the export after `change` of its config.json and tensors."""
    config, tensors = json.loads((sound / "config.json").read_text()), released.tensors_of(sound)
    change(config, tensors)
    shutil.copytree(sound, folder)
    (folder / "config.json").write_text(json.dumps(config))
    (shard,) = folder.glob("*.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, shard, {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, shard.name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return list(broken_rules(folder))


def unquantized(name: str) -> Change:
    def change(config: dict, tensors: dict[str, Tensor]) -> None:
        del tensors[f"{name}_scale_inv"]
        tensors[name] = tensors[name].to(torch.bfloat16)
        config[QUANTIZATION][LISTED].append(name.removesuffix(".weight"))

    return change


def key(name: str, value: object = ...) -> Change:
    def change(config: dict, _: object) -> None:
        groups = name.split(".")
        where = config[groups[0]] if len(groups) > 1 else config
        if value is ...:
            del where[groups[-1]]
        else:
            where[groups[-1]] = value

    return change


def tensor(name: str, make: Callable[[Tensor], Tensor]) -> Change:
    return lambda _, tensors: tensors.update({name: make(tensors[name])})


def renamed(old: str, new: str) -> Change:
    return lambda _, tensors: tensors.update({new: tensors.pop(old)})


ATTENTION = "model.layers.1.self_attn"
EXPERTS = "model.layers.1.mlp.experts"
MISTAKES: dict[str, tuple[Change, str]] = {
    "no scoring_func": (key("scoring_func"), "lacks scoring_func, for which readers have a silent default"),
    "no topk_method": (key("topk_method"), "config.json lacks topk_method"),
    "rope_theta in rope_parameters alone": (key("rope_theta"), "config.json lacks rope_theta"),
    "static activations": (key(f"{QUANTIZATION}.activation_scheme", "static"), "activation_scheme='static' must be"),
    "kv_a in BF16 beside q_a in FP8": (
        unquantized(f"{ATTENTION}.kv_a_proj_with_mqa.weight"),
        "kv_a_proj_with_mqa.weight are merged and some are FP8, others not",
    ),
    "one expert in BF16": (unquantized(f"{EXPERTS}.2.down_proj.weight"), "mlp.experts are FP8 in part"),
    "a module listed by its last name": (
        lambda config, _: config[QUANTIZATION][LISTED].append("self_attn.o_proj"),
        "has self_attn.o_proj, which is no module's full path",
    ),
    "an unlisted BF16 projection": (
        lambda config, tensors: (
            unquantized(f"{ATTENTION}.o_proj.weight")(config, tensors),
            config[QUANTIZATION][LISTED].remove(f"{ATTENTION}.o_proj"),
        ),
        f"{ATTENTION}.o_proj.weight is not FP8 and modules_to_not_convert lacks",
    ),
    "scales of floored blocks": (
        tensor(f"{ATTENTION}.kv_a_proj_with_mqa.weight_scale_inv", lambda t: t[:1]),
        "must be F32 [2, 1] and is",
    ),
    "scales in BF16": (
        tensor(f"{ATTENTION}.o_proj.weight_scale_inv", lambda t: t.to(torch.bfloat16)),
        "must be F32 [1, 1] and is ('BF16'",
    ),
    "weight_scale for weight_scale_inv": (
        renamed(f"{ATTENTION}.o_proj.weight_scale_inv", f"{ATTENTION}.o_proj.weight_scale"),
        "o_proj.weight_scale is looked for by no reader",
    ),
    "the routers' bias in BF16": (
        tensor("model.layers.1.mlp.gate.e_score_correction_bias", lambda t: t.to(torch.bfloat16)),
        "must be F32, in which readers add it",
    ),
    "a norm in FP32": (tensor("model.norm.weight", Tensor.float), "model.norm.weight is F32 and torch_dtype says"),
    "MTP's eh_proj in FP8": (
        lambda _, tensors: tensors.update(
            zip(
                ["model.layers.2.eh_proj.weight", "model.layers.2.eh_proj.weight_scale_inv"],
                released.block_fp8(tensors["model.layers.2.eh_proj.weight"]),
                strict=True,
            )
        ),
        "model.layers.2.eh_proj.weight is FP8 and its reader takes it as bfloat16",
    ),
    "no embedding of MTP": (
        lambda _, tensors: tensors.pop("model.layers.2.embed_tokens.weight"),
        "model.layers.2.embed_tokens.weight is missing",
    ),
    "MTP not announced": (key("num_nextn_predict_layers", 0), "model.layers.2.enorm.weight is looked for by no reader"),
    "down_proj transposed": (
        tensor("model.layers.1.mlp.shared_experts.gate_proj.weight", lambda t: t[:64]),
        "gate_proj.weight is [64, 128] and config.json makes it [128, 128]",
    ),
}  # fmt: skip


def test_a_sound_export_breaks_no_rule(sound, tmp_path):
    assert broken(sound, tmp_path / "same", lambda config, tensors: None) == []


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_found(name, sound, tmp_path):
    change, sentence = MISTAKES[name]
    said = broken(sound, tmp_path / "broken", change)
    assert any(sentence in one for one in said), said


def test_narrow_parts_of_merged_layers_and_odd_widths_are_found(sound, tmp_path):
    def narrow(config: dict, tensors: dict[str, Tensor]) -> None:
        config["intermediate_size"] = 192
        for name in ("gate", "up"):
            weight = f"model.layers.0.mlp.{name}_proj.weight"
            tensors[weight] = tensors[weight][:192]
        weight = "model.layers.0.mlp.down_proj.weight"
        tensors[weight] = tensors[weight][:, :192]

    said = broken(sound, tmp_path / "narrow", narrow)
    assert any("gate_proj.weight is merged before another and its 192 rows" in one for one in said), said
    assert any("down_proj.weight is FP8 and its 192 inputs are no multiple of 128" in one for one in said), said


def test_files_and_index_agree(sound, tmp_path):
    shutil.copytree(sound, tmp_path / "copy")
    save_file({"extra": torch.zeros(1)}, tmp_path / "copy" / "model-00002-of-00002.safetensors")
    said = list(broken_rules(tmp_path / "copy"))
    assert any("names 1 files and there are 2" in one for one in said)
    assert any("has no metadata format=pt" in one for one in said)
    with pytest.raises(DataError, match="rules of its readers, the first"):
        check_directory(tmp_path / "copy", "it")


def test_an_export_that_breaks_a_rule_is_not_left_behind(sound, tmp_path, monkeypatch):
    config_of = export_hf.config_of
    monkeypatch.setattr(
        export_hf, "config_of", lambda *args: {k: v for k, v in config_of(*args).items() if k != "scoring_func"}
    )
    with pytest.raises(DataError, match=r"out breaks 2 rules of its readers, the first: .* lacks scoring_func"):
        export([str(sound.parent / "run"), str(tmp_path / "out"), "--precision", "fp8"])
    assert list(tmp_path.iterdir()) == []


def test_what_vllm_has_as_a_constant_can_be_exported_for_transformers_alone(tmp_path):
    released.write(released.CONFIGS["olmoe, clipped"], tmp_path / "hf")
    take([str(tmp_path / "hf"), str(tmp_path / "run")])
    with pytest.raises(DataError, match=r"clip_qkv=0.3 and vLLM's OLMoE has None: use --for transformers"):
        export([str(tmp_path / "run"), str(tmp_path / "out")])
    assert export([str(tmp_path / "run"), str(tmp_path / "out"), "--for", "transformers"]) == 0
