"""config.json of released models, with all keys that they have: read, and the model of configs/model.

`config_json/NAME.json` has the keys and values of the released file of the model that configs/model/NAME.yaml holds.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from fp8moe.cli.compose import compose
from fp8moe.interop.families import read_config
from fp8moe.model.config import ModelConfig

FILES = sorted((Path(__file__).parent / "config_json").glob("*.json"))


def comparable(c: ModelConfig) -> ModelConfig:
    """Without what a run chooses: its context and YaRN, how load is balanced, how weights are drawn."""
    router = replace(c.router, aux_loss_alpha=0.0, bias_gamma=0.0)
    router = replace(router, group_score="max") if router.num_groups == 1 else router  # of one group it decides nothing
    attention = replace(c.attention, yarn=None)
    return replace(c, router=router, attention=attention, max_seq_len=1, init_std=1.0, mtp_weight=0.0)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_released_configuration_is_the_model_of_configs(path: Path, tmp_path: Path) -> None:
    shutil.copy(path, tmp_path / "config.json")
    _, config, _ = read_config(tmp_path)
    assert comparable(config) == comparable(compose([f"model={path.stem}"]).config.model)


def test_every_configuration_of_a_released_model_is_here() -> None:
    models = {path.stem for path in Path("configs/model").glob("*.yaml")} - {"tiny"}
    assert {path.stem for path in FILES} == models
