"""Settings that can't be right: each is one sentence and exit code 2, or a configuration that is sane."""

from __future__ import annotations

import copy
import dataclasses
import math
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from fp8moe.cli.command import explain
from fp8moe.cli.compose import as_yaml, compose, config_groups, keys_of, to_dataclass, tree_of
from fp8moe.cli.compose import composed as composed_of
from fp8moe.cli.resume import _put, overlaid
from fp8moe.errors import ConfigError
from fp8moe.layers.attention.yarn import YarnConfig
from fp8moe.train.config import TrainConfig, resolve

SECRET = "never-in-any-file"
VALUES = (
    *("nan", "inf", "-inf", "-1", "-0.5", "0", "0.0", "1", "1.0", "1e12", "1e30", "-1e30", "1e-30", "1000000000000"),
    *("9" * 40, "true", "null", "", "''", "x", "1e", "0x10", "1_000", "[]", "[1]", "[nan]", "[inf,null]", "[[1]]"),
    *("{}", "{a: 1}", "{kind: mla}", "{shape: constant}", "[{until: nan}]", "a,b", "1,2", "../..", "/dev/null", "a b"),
    *("???", "${steps}", "${nothing}", "${oc.env:FP8MOE_SECRET}", "'${oc.env:FP8MOE_SECRET}'", "${oc.decode:1}"),
    *("$x", "é", "'é'", "range(1,3)", "int(3)", "'a\\nb'", "'a\nb'", "'" + "n" * 250 + "'", "~", "=", "[", "}", "fp8"),
)  # fmt: skip


YARN = "model.attention.yarn={factor: 40.0}"
YAML_VALUES = [value for value in VALUES if value not in ("=", "[", "}", "'a\nb'", "[inf,null]")]


def random_settings(count: int) -> Iterator[list[str]]:
    """One to three settings each, most of one key that exists and of a value from the list."""
    generator = random.Random(15)
    keys = [*keys_of(TrainConfig), *config_groups()]
    for _ in range(count):
        yield [
            generator.choice(("",) * 9 + ("+", "++", "~"))
            + generator.choice(keys)
            + generator.choice(("",) * 12 + ("x", ".0", "@y"))
            + "="
            + generator.choice(VALUES)
            for _ in range(generator.choice((1, 1, 1, 2)))
        ]


def numbers(value: Any) -> Iterator[float]:
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        yield from numbers(item)
    if isinstance(value, int | float):
        yield value


def judge(settings: object, tree: Callable[[], dict[str, Any]]) -> bool:
    """Whether the configuration of a tree is refused; asserts that it is in one sentence, and sane where it is not."""
    try:
        composed = composed_of(tree())
        resolved = resolve(composed.config, 1)
    except ValueError as error:
        failure = explain(error)
        assert failure.code in (2, 3) and not failure.traceback, settings
        assert str(error).isprintable() and 10 < len(str(error)) < 400 and SECRET not in str(error), settings
        return True
    assert all(math.isfinite(number) for number in numbers(dataclasses.asdict(resolved))), settings
    assert to_dataclass(TrainConfig, yaml.safe_load(as_yaml(resolved))) == resolved, settings
    assert SECRET not in composed.text, settings
    return False


def test_random_settings_are_sane_or_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through hydra, which takes most of the time; half of them are refused before it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FP8MOE_SECRET", SECRET)
    refused = sum(judge(settings, partial(tree_of, settings)) for settings in random_settings(80))
    assert 50 < refused < 80
    assert list(tmp_path.iterdir()) == []


def test_random_values_of_every_key_are_sane_or_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a config.yaml may hold them: every key with ten values, and pairs of keys."""
    monkeypatch.chdir(tmp_path)
    generator, plain, refused, count = random.Random(14), tree_of([YARN]), 0, 0
    loaded = [
        *(yaml.safe_load(value) for value in YAML_VALUES),
        math.nan,
        math.inf,
        -math.inf,
        1e12,
        10**12,
        10**40,
        1e30,
    ]
    for key in keys_of(TrainConfig) * 5:
        keys = [key, *([generator.choice(keys_of(TrainConfig))] if generator.random() < 0.3 else [])]
        changes = [(key, generator.choice(loaded)) for key in keys]
        tree = copy.deepcopy(plain)
        for name, value in changes:
            _put(tree, name, value)
        refused += judge(changes, lambda: tree)  # noqa: B023  called at once
        count += 1
    assert count >= 500 and count // 2 < refused < count
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["name=${oc.env:FP8MOE_SECRET}"], r"'\$\{oc\.env:FP8MOE_SECRET\}' calls a resolver, .*: write the value"),
        (["data.paths=[${oc.env:FP8MOE_SECRET}]"], r"data\.paths='\$\{oc\.env"),
        (["model={dim: '${oc.decode:16}'}"], r"model\.dim='\$\{oc\.decode:16\}' calls a resolver"),
        (["name='${${seed}.env:FP8MOE_SECRET}'"], "calls a resolver"),
        (["run_dir=lr,1e-3"], r"'run_dir=lr,1e-3' gives several values .* or quote text, 'run_dir=\"a,b\"'"),
        (["run_dir=''"], "run_dir='' must not be empty: use null"),
        (["steps=inf"], r"steps=inf \(float\) must be a whole number$"),
        ([f"model.mtp_weight={10**400}"], r"model\.mtp_weight=8\.98846567431158e\+307 must be at most 100"),
        ([f"model.mtp_weight=-{10**400}"], r"model\.mtp_weight=-8\.98846567431158e\+307 must be at least 0"),
        (["steps=1e12"], r"steps=1000000000000.0 \(float\) must be a whole number$"),
        (["model.dim=1000000000000"], "model.dim=1000000000000 must be at most 1048576: use 1048576 or less"),
        (["name='a\nb'"], r"name='a\\nb' must be one line without control characters: use a b"),
        (["data@x=stdlib"], "'data@x=stdlib' would put data in another place: leave @x out"),
        (["model=[tiny]"], r"model=\['tiny'\] is not one of dsv2_236b, .*: did you mean tiny"),
        (["precision=null"], "precision=None is not one of bf16, fp32, fp8"),
    ],
)  # fmt: skip
def test_settings_that_were_accepted_or_failed_with_a_traceback(settings: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        compose(settings)
    assert "\n" not in str(caught.value)


def test_a_key_of_a_group_that_is_null_makes_the_group() -> None:
    config = compose(["model.attention.yarn.factor=40", "model.attention.yarn.mscale=0.7"]).config
    assert config.model.attention.yarn == YarnConfig(factor=40.0, mscale=0.7)
    assert compose(["run_dir=runs/${name}-${seed}"]).config.run_dir == "runs/tiny-0"


def test_settings_of_a_run_that_goes_on_reach_into_lists() -> None:
    """`resume=RUN optimizer.schedule.phases.0.until=0.5` changes the list, `~steps` is refused."""
    plain, settings = tree_of([]), ["optimizer.schedule.phases.0.factor=0.5", "steps=7"]
    tree = overlaid(plain, tree_of(settings), plain, settings)
    assert tree["optimizer"]["schedule"]["phases"] == [{"shape": "cosine", "until": 1.0, "factor": 0.5}]
    assert tree["steps"] == 7
    with pytest.raises(ConfigError, match="steps must be set: leave ~steps out"):
        overlaid(plain, tree_of(["~steps"]), plain, ["~steps"])


FILES = {  # text of a file of settings, and what is said
    'name: "\\x24{oc.env:FP8MOE_SECRET}"\n': "calls a resolver",
    "defaults:\n  - override /model: ${oc.env:FP8MOE_SECRET}\n": "calls a resolver",
    "${oc.env:FP8MOE_SECRET}: 3\n": "calls a resolver",
    'name: !!python/object/apply:os.mkdir ["made"]\n': "could not determine a constructor",
    "model: {_target_: os.abort}\n": "unknown key model._target_",
    "hydra: {run: {dir: made}}\n": "settings of hydra",
    "steps: 3\nsteps: 4\n": "duplicate key steps, line 3.: write each key once",
    "steps: [\n": r"can't be read \(expected the node content.*, line 2\)",
    "steps: &a [*a]\n": "nested too deeply",
    "steps: " + "[" * 3000: "nested too deeply",
    "- steps\n": r"holds \['steps'\] and must hold keys",
    "3\n": "holds 3 and must hold keys",
    "x\0y: 3": "not YAML",
    "name: 'é'": None,
    "": None,
}


@pytest.mark.parametrize("text", FILES, ids=range(len(FILES)))
def test_a_file_of_settings(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FP8MOE_SECRET", SECRET)
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    says = FILES[text]
    if says is None:
        compose(["experiment=mine.yaml"])
    else:
        with pytest.raises(ConfigError, match=says) as caught:
            compose(["experiment=mine.yaml"])
        assert "\n" not in str(caught.value) and SECRET not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]
