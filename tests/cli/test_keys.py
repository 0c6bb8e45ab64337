"""`fp8moe keys`: every key has its type, range, default and meaning; words find keys; the docs' page is its output."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from fp8moe.__main__ import main
from fp8moe.cli.compose import compose, keys_of, tree_of
from fp8moe.cli.key_table import comments, key_table
from fp8moe.cli.keys import page, search
from fp8moe.limits import Range, check_fields, ranges_of
from fp8moe.train.config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
KEYS = {key.name: key for key in key_table()}


def test_every_key_is_there_once_and_has_a_meaning() -> None:
    known = keys_of(TrainConfig)
    groups = {key for key in known if any(other.startswith(f"{key}.") for other in known)}
    assert list(dict.fromkeys(KEYS)) == [key.name for key in key_table()]
    assert set(KEYS) == set(known) - groups | {"model.attention.yarn"}  # a group that may be null
    for name, key in KEYS.items():
        assert len(key.meaning) > 8 and "None" not in key.meaning and "`fp8moe." not in key.meaning, name
        assert key.type, name


def test_the_defaults_are_those_of_a_run_without_settings() -> None:
    tree = tree_of([])
    for name, key in KEYS.items():
        value: object = tree
        for part in name.split("."):
            value = value.get(part, "absent") if isinstance(value, dict) else "absent"
        if value == "absent" or name == "name":
            continue
        read = yaml.safe_load(key.default)
        assert read == value or float(read) == value, name
    assert KEYS["name"].default == "null" and KEYS["steps"].default == "200"
    assert KEYS["model.attention.head_dim"].default == "" and KEYS["model.attention.qk_norm"].default == "none"


def test_the_ranges_are_those_that_are_checked() -> None:
    """A bound that is printed is legal or not as it says, and just outside of it a value is refused."""
    config, tried = compose([]).config, 0
    for name, key in KEYS.items():
        if not key.type.startswith(("whole number", "number")):
            continue
        printed = re.match(r"(whole number|number), (at least|above) ([\d.,e+-]*\d)", key.type)
        assert printed, f"{name}: {key.type}"
        kind, word, text = printed.groups()
        bound = float(text.replace(",", ""))
        owner, field = _owner(config, name), name.rpartition(".")[2]
        if owner is None or not hasattr(owner, field):
            continue  # of grouped queries, or of YaRN
        wrong = bound if word == "above" else bound - 1
        with pytest.raises(ValueError, match=f"{field}=.* must be"):
            dataclasses.replace(owner, **{field: int(wrong) if kind == "whole number" else wrong})
        tried += 1
    assert tried > 60


def _owner(config: Any, name: str) -> Any:
    """The configuration that holds a key; None where a group above it is null."""
    for part in name.split(".")[:-1]:
        config = getattr(config, part, None)
    return config


def test_ranges_of_a_class_and_its_comments() -> None:
    assert ranges_of(Example) == {"count": Range(least=1), "rate": Range(above=0, below=1)}
    assert ranges_of(Bare) == {}
    assert comments(Example) == {
        "count": "How many",
        "rate": "Of two lines, the second ends it; null: none",
        "plain": "",
        "name": "The line's own",
    }
    with pytest.raises(ValueError, match="count=0 must be at least 1"):
        Example(count=0)


@dataclass(frozen=True)
class Example:
    """A class of this test."""

    count: int = 1  # how many
    # of two lines, the second
    # ends it; None: none (`fp8moe.limits`)
    rate: float | None = None
    plain: str = "a # b"
    # not this one
    name: str = "x"  # the line's own

    def __post_init__(self) -> None:
        check_fields(self, "example", count=Range(least=1), rate=Range(above=0, below=1))


@dataclass(frozen=True)
class Bare:
    """Without checks."""

    text: str = ""  # some


def test_the_page_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    written = (ROOT / "docs" / "keys.md").read_text()
    assert main(["keys", "--markdown"]) == 0
    printed = capsys.readouterr().out
    assert printed == page(key_table())
    assert written == printed, "fp8moe keys --markdown > docs/keys.md"
    for name in KEYS:
        assert f"\n| `{name}` | " in written
    assert "`kind=gqa` alone" in written and "| `optimizer.schedule.peak` | number, above 0, at most 100 |" in written


def test_a_word_finds_keys(capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: str) -> str:
        assert main(["keys", *words]) == 0
        return capsys.readouterr().out

    assert said("micro_batch").startswith(
        "batch.micro_batch=null   whole number, at least 1, at most 1,048,576; or null"
    )
    assert said("lr").startswith("lr is not a key: use optimizer.schedule.peak=...\noptimizer.schedule.peak=0.001 ")
    assert said("optimzer.eps").startswith(
        "no key has 'optimzer.eps' in its name or meaning; the nearest:\noptimizer.eps="
    )
    assert "parallel.ep=null" in said("share", "the", "experts")
    assert said("tensor-parallel-size").startswith("tensor-parallel-size is not a key: no matrix is split over ranks")
    everything = said()
    assert (
        all(f"\n{name}" in f"\n{everything}" for name in KEYS) and "lr_schedule=NAME   one of constant, " in everything
    )
    assert main(["keys", "qqqqqqqq"]) == 2
    assert (
        capsys.readouterr().err
        == f"fp8moe: no key has 'qqqqqqqq' in its name or meaning: fp8moe keys lists all {len(KEYS)}\n"
    )


def test_a_name_comes_before_a_meaning() -> None:
    names = [key.name for key in search("ep", list(KEYS.values()))]
    assert names[0] == "parallel.ep" and names.index("model.mtp_depth") > 0
    assert "batch.sequences" not in names  # the letters inside another word of the meaning
    with_meaning = [key.name for key in search("warm", list(KEYS.values()))]
    assert with_meaning[0] == "optimizer.schedule.warmup_steps"


def test_a_key_of_one_kind_alone_says_so() -> None:
    assert {key.kind for key in KEYS.values()} == {"", "mla", "gqa"}
    assert KEYS["model.attention.head_dim"].kind == "gqa" and KEYS["model.attention.v_dim"].kind == "mla"
    assert KEYS["model.attention.num_heads"].kind == "" and KEYS["model.attention.kind"].type == "mla or gqa"
    assert dataclasses.replace(KEYS["steps"], name="a.b").group == "a" and KEYS["steps"].group == ""
