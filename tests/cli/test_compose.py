"""Settings to a configuration: the packaged files, and one sentence for each mistake."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from fp8moe.cli.compose import CONFIGS, MOVED, as_yaml, compose, config_groups, keys_of, to_dataclass, tree_of
from fp8moe.errors import ConfigError
from fp8moe.layers.attention import GqaConfig, MlaConfig
from fp8moe.layers.attention.yarn import YarnConfig
from fp8moe.layers.recipe import Precision
from fp8moe.model.flops import count_parameters
from fp8moe.train.config import TrainConfig, resolve, stages_of


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def leaves(tree: Any, path: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield f"{path}{key}"
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{key}.")


def test_every_key_is_in_the_files_and_so_can_be_overridden() -> None:
    told = set(leaves(yaml.safe_load(compose([]).text)))
    attention = "model.attention."
    optional = {key for key in keys_of(TrainConfig) if key.startswith(f"{attention}yarn.")}
    others = {f"{attention}{key}" for key in keys_of(GqaConfig)} - {f"{attention}{key}" for key in keys_of(MlaConfig)}
    assert set(keys_of(TrainConfig)) - optional - others == told
    groups = {"model": choices("model"), "data": choices("data"), "parallel": ["default"], "logging": ["default"]}
    for group, names in groups.items():
        for name in names:
            tree = yaml.safe_load((CONFIGS / group / f"{name}.yaml").read_text())
            keys = set(keys_of(TrainConfig)) - optional
            if group == "model":  # the keys of its kind of attention alone
                kind = {"mla": MlaConfig, "gqa": GqaConfig}[tree["attention"]["kind"]]
                keys = {key for key in keys if not key.startswith(attention)} | {
                    f"{attention}{key}" for key in keys_of(kind) if "." not in key or tree["attention"]["yarn"]
                }
            assert {f"{group}.{key}" for key in leaves(tree)} | {group} == {
                key for key in keys if key == group or key.startswith(f"{group}.")
            }, name


@pytest.mark.parametrize("group", sorted(config_groups()))
def test_every_choice_composes(group: str) -> None:
    for name in choices(group):
        with_files = f"{group}/{name}" in ("data/indexed", "data/chat") or (
            group == "experiment" and name != "quickstart"
        )
        more = ["data.paths=[a,b]"] if with_files else []
        more += ["model=dsv3_671b"] if name == "sft" else []  # which is for the model of init_from
        composed = compose([f"{group}={name}", *more])
        assert to_dataclass(TrainConfig, yaml.safe_load(composed.text)) == composed.config


def test_published_models_have_the_published_size() -> None:
    sizes = {name: count_parameters(compose([f"model={name}"]).config.model) for name in choices("model")}
    assert sizes["dsv3_671b"].total == pytest.approx(671e9, rel=1e-3)
    assert sizes["dsv3_671b"].active == pytest.approx(36.7e9, rel=5e-3)
    assert sizes["dsv3_671b"].mtp == pytest.approx(11.5e9, rel=2e-2)
    assert sizes["dsv2_236b"].total == pytest.approx(236e9, rel=2e-3)
    assert sizes["dsv2_lite_16b"].total == pytest.approx(15.7e9, rel=2e-3)
    assert sizes["tiny"].total < 10e6


def test_names_and_overrides() -> None:
    assert compose([]).config.name == "tiny"
    assert compose(["experiment=quickstart", "name=null"]).config.name == "quickstart"
    assert compose(["model=dsv2_lite_16b"]).config.name == "dsv2_lite_16b"
    quickstart = compose(["experiment=quickstart", "steps=20", "precision=bf16", "parallel.ep=4"]).config
    assert (quickstart.name, quickstart.steps, quickstart.parallel.ep) == ("quickstart", 20, 4)
    assert quickstart.precision.mode is Precision.BF16
    assert compose(["name=mine", "model=dsv2_lite_16b", "run_dir=some/where"]).config.name == "mine"
    assert compose(["model.vocab_size=512"]).config.data.vocab_size == 512
    long = compose(["model.attention.yarn={factor: 40.0}", "model.max_seq_len=163840", "optimizer.eps=1e-7"]).config
    assert long.model.attention.yarn == YarnConfig(factor=40.0) and long.optimizer.eps == 1e-7


def test_the_published_layout_takes_2048_gpus() -> None:
    words = ["experiment=dsv3_pretrain", "parallel=dsv3_2048", "data.paths=[some]"]
    with pytest.raises(ValueError, match=r"ramp_from=3072 makes 24 micro-batches .* needs at least 32, .*: use 4096"):
        resolve(compose(words).config, 2048)
    config = resolve(compose([*words, "batch.ramp_from=4096", "batch.increment=1024"]).config, 2048)
    assert (config.dp, config.ep, config.micro_batch, config.num_microbatches) == (128, 64, 1, 120)
    stages = stages_of(config)
    assert len(stages) == 16 and stages[-1].mtp and sum(stage.num_layers for stage in stages) == 61


def test_the_quickstart_runs_on_one_to_eight_processes() -> None:
    config = compose(["experiment=quickstart"]).config
    for world_size in (1, 2, 4, 8):
        resolved = resolve(config, world_size)
        assert resolved.ep == world_size
        assert yaml.safe_load(as_yaml(resolved))["parallel"]["ep"] == world_size


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["model.dimm=3"], "unknown key model.dimm: did you mean model.dim?"),
        (["ep=2"], "unknown key ep: did you mean parallel.ep?"),
        (["modle=tiny"], "unknown key modle: did you mean model?"),
        (["+new=1"], "unknown key new: "),
        (["model=tinny"], f"model=tinny is not one of {', '.join(choices('model'))}: did you mean tiny?"),
        (["precision=int4"], "precision=int4 is not one of bf16, fp32, fp8$"),
        (["foo"], "'foo' is not a setting: write key=value"),
        (["steps=1,2"], r"'steps=1,2' gives several values and steps takes one: write a list as \[a,b\]"),
        (["hydra.run.dir=x"], "hydra.run.dir is a setting of hydra"),
        (["cluster=h100_8"], "cluster is a setting of fp8moe plan: leave it out"),
        (["cluster.nodes=4"], "cluster.nodes is a setting of fp8moe plan: leave it out"),
        (["steps=[1"], r"'steps=\[1' has a list that does not end: write steps=\[1\]$"),
        (["steps=${nothing}"], "nothing"),
        (["steps=five"], "steps='five' .* must be a whole number"),
        (["data.weights=[1,a]"], r"data.weights\[1\]='a'"),
        (["~model.dim"], "model.dim must be set: 1 of "),
        (["model.attention.kind=gqq"], "model.attention.kind='gqq' is not one of mla, gqa: did you mean gqa?"),
        (["model.attention.kind=gqa"], r"unknown key model\.attention\.\w+: "),
        (
            ["model.attention.head_dim=64"],
            r"unknown key model\.attention\.head_dim: did you mean model\.attention\.\w+\?",
        ),
        (["model=qwen3_30b_a3b", "model.attention.kv_lora_rank=64"], r"unknown key model\.attention\.kv_lora_rank: "),
        (["model.dense_layers=[0]"], r"dense_layers=\[0\] must ascend, from num_dense_layers=1 to 3, .*: use \[\]$"),
        (["model.attention=3"], r"model.attention=3 \(int\) must be a group of keys"),
        (["model.dim=200"], "model.dim=200 must be a multiple of 16, which FP8 needs: use 192"),
    ],
)
def test_wrong_words_are_one_sentence(words: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        compose(words)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_the_right_key_in_another_group_is_found() -> None:
    """By its last name first, whatever else looks alike."""
    with pytest.raises(ConfigError, match=r"unknown key topk: did you mean model.router.topk\?$"):
        compose(["topk=2"])
    with pytest.raises(ConfigError, match=r"unknown key zzz: the keys here are model, model\.vocab_size"):
        compose(["zzz=2"])


def test_a_list_inside_a_leaf_is_left_to_hydra() -> None:
    with pytest.raises(ConfigError, match=r"data\.paths"):
        compose(["data.paths.0=a"])


FLAT_KEYS = (
    *("num_heads", "kv_lora_rank", "nope_dim", "rope_dim", "v_dim", "expert_hidden", "num_experts", "topk"),
    *("q_lora_rank", "num_shared_experts", "num_groups", "top_groups", "score", "normalize_topk", "route_scale"),
    *("force_balance", "aux_loss_alpha", "bias_gamma", "rope_theta", "yarn", "attention"),
    *(f"yarn.{field.name}" for field in fields(YarnConfig) if field.name != "truncate"),  # it was never there
)


@pytest.mark.parametrize("key", FLAT_KEYS)
def test_a_key_of_the_flat_model_names_the_new_one(key: str) -> None:
    """Every key that the flat configuration of a model had and that is elsewhere now."""
    renamed = {"attention": "attention.backend", "expert_hidden": "experts.hidden", "num_shared_experts": "num_shared"}
    new = MOVED[f"model.{key}"]
    assert new in keys_of(TrainConfig) and new.endswith(f".{renamed.get(key, key)}")
    for pattern in ("{}=flash", "+{}=flash", "~{}") if key != "attention" else ("{}=flash",):
        with pytest.raises(ConfigError) as caught:
            compose([pattern.format(f"model.{key}")])
        assert str(caught.value) == f"model.{key} is now {new}: write {pattern.format(new)}"


def test_no_key_of_today_is_called_moved() -> None:
    assert len(MOVED) == len(FLAT_KEYS)
    assert set(MOVED) & set(keys_of(TrainConfig)) == {"model.attention"}
    assert compose(["model.attention={backend: flash}"]).config.model.attention.backend == "flash"


def test_configs_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert compose([]).config.name == "tiny"


def test_a_tree_is_the_callers_own_and_a_file_is_read_each_time(tmp_path: Path) -> None:
    """What hydra composed of the same settings is kept: nobody may change it, and no file may change behind it."""
    first = tree_of(["steps=7"])
    first["model"]["dim"], first["data"]["paths"] = 0, ["mine"]
    assert tree_of(["steps=7"]) == tree_of(["steps=7 "]) != first
    file = tmp_path / "mine.yaml"
    for steps in (3, 4):
        file.write_text(f"steps: {steps}\n")
        assert tree_of([f"experiment={file}"])["steps"] == steps
