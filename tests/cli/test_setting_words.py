"""A word that is nearly a setting: what is wrong with it, and the word that is read in its place."""

from __future__ import annotations

import os
import shlex

import pytest

from fp8moe.__main__ import main
from fp8moe.cli.hydra_tree import parse
from fp8moe.errors import ConfigError

EMPTY, OPEN, QUOTE = "an empty entry in its list", "a list that does not end", "a sign that is read in quotes alone"
MINE = os.environ.get("HOME", "/me")
SPACE, HOME = "a space beside its key", "a ~ that the shell leaves as it is"


@pytest.mark.parametrize(
    ("word", "wrong", "instead", "value"),
    [
        ("data.paths=[a,]", EMPTY, "data.paths=[a]", ["a"]),
        ("data.paths=[,a,,b]", EMPTY, "data.paths=[a,b]", ["a", "b"]),
        ("data.paths=[,]", EMPTY, "data.paths=[]", []),
        ("data.paths=[a, b", OPEN, "'data.paths=[a, b]'", ["a", "b"]),
        ("steps =3", SPACE, "steps=3", 3),
        (" run_dir=my run", SPACE, "'run_dir=my run'", "my run"),
        ("run_dir=runs/é", QUOTE, "'run_dir=\"runs/é\"'", "runs/é"),
        ("run_dir=it's", QUOTE, shlex.quote('run_dir="it\'s"'), "it's"),
        ("init_from=a=b", QUOTE, "'init_from=\"a=b\"'", "a=b"),
        ("data.paths=[ä/b,c d]", QUOTE, '\'data.paths=["ä/b","c d"]\'', ["ä/b", "c d"]),
        ("run_dir=~/x", HOME, '"run_dir=$HOME/x"', f"{MINE}/x"),
        ("data.paths=[~/x y,~/z]", HOME, '"data.paths=[$HOME/x y,$HOME/z]"', [f"{MINE}/x y", f"{MINE}/z"]),
    ],
)  # fmt: skip
def test_the_word_to_write_in_its_place(word: str, wrong: str, instead: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(word)
    assert str(caught.value) == f"{word!r} has {wrong}: write {instead}"
    (typed,) = shlex.split(instead.replace("$HOME", os.environ["HOME"]))  # as a shell gives it to the program
    assert parse(typed).value() == value


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train =3"], "'train =3' has a space beside its key: write train=3"),
        (["steps", "=3"], "'steps' is not a setting: write key=value, without spaces around ="),
        (["quickstart"], "'quickstart' is not a setting: write experiment=quickstart"),
        (["tiny"], "'tiny' is not a setting: write model=tiny"),
        (["=3"], "'=3' is not a setting: write key=value, without spaces around ="),
        (["größe=3"], "'größe=3' begins with no key, which is a word of letters and dots: see fp8moe keys"),
        (["+steps=3"], "+steps would add a key that is there: write steps=VALUE"),
        (["a.=3"], "'a.=3' can't be read as key=value (token recognition error at: '.'): write 'KEY=\"VALUE\"'"),
        ([f"name={'é' * 200}"], f"'name={'é' * 51}... has a sign that is read in quotes alone: write 'KEY=\"VALUE\"'"),
    ],
)
def test_the_command_says_it(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *words]) == 2
    assert capsys.readouterr().err == f"fp8moe: {sentence}\n"
