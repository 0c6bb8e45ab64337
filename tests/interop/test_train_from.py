"""init_from=HF_DIR: every rank reads what it holds; trained in FP8 over ep=2 and exported, it loads in transformers."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config

from fp8moe.cli.compose import compose
from fp8moe.cli.export_model import main as export
from fp8moe.cli.import_model import main as take
from fp8moe.errors import ConfigError
from fp8moe.interop.hf_model import HfModel, open_model, open_released
from fp8moe.train.build import build
from fp8moe.train.config import TrainConfig, resolve
from fp8moe.train.loop import run_to_end
from fp8moe.train.processes import mesh_of
from fp8moe.train.run import Run
from fp8moe.train.run_dir import make_run_dir
from tests.interop import released
from tests.interop.test_export import loaded
from tests.parallel.ranks import run_ranks
from tests.train.runs import VOCABULARY, joined, stored, write_corpus

CPU = torch.device("cpu")
RELEASED = {  # configs/model of each family
    "deepseek_v3": "dsv3_671b", "deepseek_v2": "dsv2_lite_16b", "qwen3_moe": "qwen3_30b_a3b", "glm4_moe": "glm45_air",
    "olmoe": "olmoe_7b", "gpt_oss": "gpt_oss_20b",
}  # fmt: skip
LAYOUT = ["parallel.schedule=1f1b", "parallel.pp=2", "parallel.ep=2", "batch.micro_batch=1"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> list[str]:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    """A released model with an MTP layer, in FP32."""
    folder = tmp_path_factory.mktemp("hf")
    sizes = released.V3 | dict(
        vocab_size=VOCABULARY, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2
    )
    released.write(DeepseekV3Config(**sizes), folder)
    released.rewrite(folder, released.with_mtp(released.tensors_of(folder), 3))
    return folder


def settings(tree: Mapping[str, Any], group: str = "model") -> list[str]:
    """The model's configuration as settings."""
    found = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found += settings(value, f"{group}.{key}")
        elif isinstance(value, tuple):
            found.append(f"{group}.{key}={list(value)}")
        else:
            said = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
            found.append(f"{group}.{key}={said}")
    return found


def configured(corpus: list[str], hf: Path, *more: str, world_size: int = 1) -> TrainConfig:
    model = open_model(hf)
    own = [f"model={RELEASED[model.family.model_type]}", *settings(asdict(model.config))]
    run = ["seq_len=32", "batch.sequences=8", "device=cpu", "steps=2", "validation.samples=8", "parallel.timeout=60"]
    return resolve(compose([*own, *corpus, *run, f"init_from={hf}", *more]).config, world_size, open_released)


def built(config: TrainConfig) -> Run:
    mesh = mesh_of(config, CPU)
    if config.run_dir is not None and mesh.rank == 0:
        make_run_dir(config.run_dir, config.name, config.resume)
    return build(config, mesh, CPU, Path(config.run_dir or "nowhere"), open_released)


def held(corpus: list[str], hf: Path) -> tuple[dict[str, torch.Tensor], int]:
    """What a rank of four holds of the weights and biases, and the values it asked for."""
    asked = 0
    fill = HfModel.fill

    def counted(self: HfModel, name: str, first: int, out: torch.Tensor) -> None:
        nonlocal asked
        asked += len(out)
        fill(self, name, first, out)

    HfModel.fill = counted  # type: ignore[method-assign]
    tensors = stored(built(configured(corpus, hf, *LAYOUT, world_size=4)))
    mine = {name: tensor for name, tensor in tensors.items() if name.startswith(("master.", "bias."))}
    return mine, asked


def test_any_layout_begins_from_a_released_model_and_reads_what_it_holds(corpus, hf):
    model = open_model(hf)
    ranks = run_ranks(held, 4, corpus, hf)
    ours = joined(tensors for tensors, _ in ranks)
    assert ours.keys() == model.parameters.keys()
    for name, values in ours.items():
        there = torch.full((len(values),), float("nan"))
        model.fill(name, 0, there)
        assert torch.equal(values, there), name
    for tensors, asked in ranks:
        assert asked == sum(len(values) for values in tensors.values())


def trained(corpus: list[str], hf: Path, folder: Path) -> float:
    config = configured(
        corpus,
        hf,
        f"run_dir={folder}",
        "parallel.ep=2",
        "precision=fp8",
        "optimizer.schedule.warmup_steps=0",
        world_size=2,
    )
    return run_to_end(built(config), time.perf_counter()).loss


@pytest.mark.parametrize(
    "name", ["v3", "v2, greedy", "qwen3", "glm4, biases, norms, half rotated", "olmoe", "gpt_oss, yarn, three heads"]
)
def test_imported_trained_over_ep_2_in_fp8_and_exported(name, corpus, hf, tmp_path):
    if name != "v3":
        config, hf = copy.deepcopy(released.CONFIGS[name]), tmp_path / "hf"
        config.vocab_size = VOCABULARY
        released.write(config, hf)
    losses = run_ranks(trained, 2, corpus, hf, tmp_path / "run")
    assert all(math.isfinite(loss) for loss in losses)
    export([str(tmp_path / "run"), str(tmp_path / "out")])
    ids = released.ids(VOCABULARY, 32)
    with torch.no_grad():
        model = released.imported(tmp_path / "run")
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
        ours = model.logits(ids)
    theirs = loaded(tmp_path / "out")
    with torch.no_grad():
        difference = (theirs(ids).logits - ours).abs().max()
    assert difference < 1e-4 * ours.abs().max()
    before, after = released.tensors_of(hf), released.tensors_of(tmp_path / "out")
    moved = [
        name for name in before if not torch.equal(before[name].to(torch.bfloat16), after[name].to(torch.bfloat16))
    ]
    assert len(moved) > len(before) / 2, "training moved the weights"


def test_a_run_begins_from_an_import_as_from_the_directory(corpus, hf, tmp_path):
    take([str(hf), str(tmp_path / "run")])
    ours, theirs = (
        joined([stored(built(configured(corpus, hf, "precision=fp32", f"init_from={one}")))])
        for one in (tmp_path / "run", hf)
    )
    names = [name for name in theirs if name.startswith(("master.", "bias."))]
    with pytest.raises(
        ConfigError, match="holds weights and no state of an optimizer: begin a run from it, init_from="
    ):
        built(configured(corpus, hf, "seed=0", "seq_len=64", f"resume={tmp_path / 'run'}"))
    assert len(names) > 40 and all(torch.equal(ours[name], theirs[name]) for name in names)


def test_a_run_of_another_model_is_refused(corpus, hf):
    with pytest.raises(ConfigError, match=r"has model.router.route_scale=2.5 and this run has 1.0: use 2.5$"):
        configured(corpus, hf, "model.router.route_scale=1.0")
    with pytest.raises(
        ConfigError, match=r": use 1e-06, 1 more to be changed, or all of its settings: fp8moe import makes"
    ):
        configured(corpus, hf, "model.router.route_scale=1.0", "model.norm_eps=0.5")
    with pytest.raises(ConfigError, match=r"holds no average of weights: use init_from_ema=false"):
        configured(corpus, hf, "init_from_ema=true")
    longer = configured(corpus, hf, "model.attention.yarn={factor: 4.0}", "model.max_seq_len=4096")
    assert longer.model.attention.yarn.factor == 4.0, "an extension of its context is no other model"
    assert built(configured(corpus, hf, "model.mtp_depth=0")).model.mtp is None
