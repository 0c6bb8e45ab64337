"""config.json of every family: what is written is read back as the same model; name maps of the released ones."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from fp8moe.cli.compose import to_dataclass
from fp8moe.errors import ConfigError
from fp8moe.interop.config_json import Keys
from fp8moe.interop.families import FAMILIES, family_for
from fp8moe.interop.hf_dir import Entry, HfDirectory
from fp8moe.interop.hf_model import HfModel
from fp8moe.interop.names import RowOrder
from fp8moe.interop.reader_names import expected
from fp8moe.model.config import ModelConfig
from tests.interop import released

MODELS = {
    "dsv3_671b": "deepseek_v3", "dsv2_236b": "deepseek_v2", "dsv2_lite_16b": "deepseek_v2", "kimi_k2": "kimi_k2",
    "moonlight_16b": "deepseek_v3", "qwen3_30b_a3b": "qwen3_moe", "glm45_air": "glm4_moe", "olmoe_7b": "olmoe",
    "gpt_oss_20b": "gpt_oss",
}  # fmt: skip
FREE = ("router.bias_gamma", "router.aux_loss_alpha", "init_std", "mtp_weight")


def model_of(name: str) -> ModelConfig:
    tree = yaml.safe_load((Path("configs/model") / f"{name}.yaml").read_text())
    return to_dataclass(ModelConfig, tree, "model")


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_is_read_back(name):
    model = model_of(name)
    family = family_for(model, MODELS[name])
    assert family.model_type == MODELS[name]
    written = family.write(model)
    again = asdict(family.read(Keys(written | {"model_type": MODELS[name]}, "config.json")))
    before = asdict(model)
    for key in FREE:
        group, _, last = key.rpartition(".")
        for tree in (again, before):
            (tree[group] if group else tree).pop(last)
    assert again == before


@pytest.mark.parametrize("name", MODELS)
def test_the_name_map_has_every_tensor_that_readers_look_for(name):
    model = model_of(name)
    family = FAMILIES[MODELS[name]]
    looked_for = expected(family.write(model) | {"model_type": MODELS[name]})
    ours = {source.name: source.shape for one in family.parameters(model, False) for source in one.sources}
    originals = dict(family.copies(model))
    ours |= {copy: ours[original] for copy, original in originals.items()}
    assert ours == looked_for


@pytest.mark.parametrize(
    "settings", [dict(decoder_sparse_step=2), dict(decoder_sparse_step=3, mlp_only_layers=[2]), dict(), None]
)
def test_dense_layers_that_readers_look_for_are_those_of_transformers(settings):
    """None: a config.json without the key, for which every reader has 1."""
    config = Qwen3MoeConfig(**released.QWEN3 | dict(num_hidden_layers=6) | (settings or {}))
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config).state_dict()
    keys = config.to_dict() | {"num_experts": config.num_experts}
    if settings is None:
        del keys["decoder_sparse_step"]
    dense = "model.layers.{}.mlp.gate_proj.weight"
    found = expected(keys)
    assert [dense.format(i) in found for i in range(6)] == [dense.format(i) in theirs for i in range(6)]
    assert {name: shape for name, shape in found.items() if ".experts." not in name} == {
        name: tuple(tensor.shape) for name, tensor in theirs.items() if ".experts." not in name
    }


@pytest.mark.parametrize(
    "kinds", [("sliding", "full"), ("full", "sliding"), ("sliding", "sliding"), ("full", "full")], ids="-".join
)
def test_windows_of_layers_are_those_of_config_json(kinds):
    family, said = FAMILIES["gpt_oss"], [f"{kinds[i % 2]}_attention" for i in range(24)]
    keys = family.write(model_of("gpt_oss_20b")) | {"model_type": "gpt_oss", "layer_types": said}
    model = family.read(Keys(keys, "config.json"))
    window = {"sliding": 128, "full": None}
    assert [model.attention.window_of(i) for i in range(24)] == [window[kinds[i % 2]] for i in range(24)]
    assert family.write(model)["layer_types"] == said
    changed = keys | {"layer_types": ["full_attention", *said[1:-1], "sliding_attention"]}
    if kinds[0] == kinds[1]:
        with pytest.raises(ConfigError, match=r"layer_types=.* is not supported, windows in other layers"):
            family.read(Keys(changed, "config.json"))


def test_a_model_that_no_family_can_say(tmp_path):
    model = to_dataclass(
        ModelConfig, asdict(model_of("dsv3_671b")) | {"router": asdict(model_of("olmoe_7b").router)}, "model"
    )
    with pytest.raises(ConfigError, match="no family of released models can say this model"):
        family_for(model)


@pytest.mark.parametrize("order", [RowOrder("heads", 8, 4), RowOrder("heads", 6, 6), RowOrder("strided", 2, first=1)])
def test_rows_in_another_order(order):
    rows = 48
    index = order.index(rows)
    assert index.unique().numel() == rows
    if order.kind == "strided":
        assert index.tolist() == list(range(1, 2 * rows, 2))
        return
    nope, half = order.size - order.rotary, order.rotary // 2
    head = index[: order.size].tolist()
    assert head[:nope] == list(range(order.rotary, order.size))  # features without position come first here
    assert head[nope::2] == list(range(half)) and head[nope + 1 :: 2] == list(range(half, 2 * half))
    assert torch.equal(index[order.size : 2 * order.size], index[: order.size] + order.size)


def test_ranks_of_an_import_of_deepseek_v3_read_the_checkpoint_once():
    """On headers alone: 8 stages by 8 ranks of experts read, together, every byte of the 671B model once."""
    model = model_of("dsv3_671b")
    family, stages, ep = FAMILIES["deepseek_v3"], 8, 8
    found = {one.stored_name: one for one in family.parameters(model, False)}
    directory = object.__new__(HfDirectory)
    quantized = {
        source.name for one in found.values() if one.linear for source in one.sources if "eh_proj" not in source.name
    }
    directory.entries = {
        source.name: Entry("", "F8_E4M3" if source.name in quantized else "BF16", source.shape)
        for one in found.values()
        for source in one.sources
    }
    whole = HfModel(family, model, directory, {}, found)
    read = torch.zeros(stages, ep, dtype=torch.int64)
    for name, one in found.items():
        block = (
            one.name.split(".")[1] if one.name.startswith("blocks.") else "0" if one.name.startswith("emb") else "60"
        )
        stage = int(block) * stages // model.num_layers
        share = one.length // ep
        for rank in range(ep) if ".experts." in one.name else (0,):
            ends = (rank * share, (rank + 1) * share) if ".experts." in one.name else (0, one.length)
            read[stage, rank] += whole.bytes_of(name, *ends)
    assert int(read.sum()) == directory.num_bytes
    assert 680e9 < directory.num_bytes < 700e9
    assert (read[:, 1:] < read[:, :1]).all() and (read > 0).all()
