"""state.json: keys that an earlier version did not write have their defaults, and other models are refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fp8moe.cli.compose import compose
from fp8moe.errors import ConfigError
from fp8moe.train.checkpoint.choose import readable_weights
from fp8moe.train.checkpoint.state import STATE_FILE, RunState, read_state, state_text

STATE = RunState(step=3, updates=2, consumed=48, skipped=1, seed=7, seq_len=64, data={"a": "b"}, skipped_in_a_row=1)


def test_a_key_that_was_not_written_has_its_default(tmp_path: Path) -> None:
    model = compose(["model=tiny"]).config.model
    content = json.loads(state_text(STATE, model, {}))
    for name in ("data", "skipped_in_a_row"):
        del content[name]
    del content["model"]["dense_layers"], content["model"]["experts"]["activation"]
    (tmp_path / STATE_FILE).write_text(json.dumps(content))
    assert read_state(tmp_path, model) == replace(STATE, data=None, skipped_in_a_row=0)
    other = replace(model, experts=replace(model.experts, activation="swiglu_clamped"))
    said = r"model: model\.experts\.activation='swiglu' there and 'swiglu_clamped' here: use .*\.activation='swiglu'$"
    with pytest.raises(ConfigError, match=said):
        read_state(tmp_path, other)


def test_weights_of_another_model_are_one_setting_and_the_words_that_take_all(tmp_path: Path) -> None:
    """And not a list of every setting that differs."""
    model, run = compose([]).config.model, tmp_path / "my run"
    step = run / "checkpoints" / "step-3"
    step.mkdir(parents=True)
    (step / "manifest.json").touch()
    (step / STATE_FILE).write_text(state_text(STATE, model, {}))
    other = replace(model, dim=512, num_layers=3, vocab_size=64)
    said = f"{step} is a checkpoint of another model: model.dim=256 there and 512 here, and 2 more model settings: use "
    for name in (run, step):
        with pytest.raises(ConfigError) as caught:
            readable_weights(str(name), other, averaged=False)
        assert str(caught.value) == f"{said}model.dim=256"
    (run / "config.yaml").touch()
    for name in (run, step):
        with pytest.raises(ConfigError) as caught:
            readable_weights(str(name), other, averaged=False)
        all_of_them = f", or all of its run's by --from '{name}' 'init_from={name}'"
        assert str(caught.value) == f"{said}model.dim=256{all_of_them}"
