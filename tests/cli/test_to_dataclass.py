"""Strict conversion: every key a field, every value of its type, one family of a union; one sentence otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

import pytest

from fp8moe.cli.compose import keys_of, to_dataclass
from fp8moe.errors import ConfigError


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Inner:
    size: int
    share: float = 0.5

    def __post_init__(self) -> None:
        assert isinstance(self.share, float)
        if self.size < 0:
            raise ValueError(f"inner.size={self.size} must be at least 0")


@dataclass(frozen=True)
class Outer:
    inner: Inner
    colour: Colour
    mode: Literal["a", "b"]
    names: tuple[str, ...] = ()
    parts: tuple[Inner, ...] = ()
    extra: Inner | None = None
    limit: int | None = None
    flag: bool = False


GOOD: dict[str, Any] = {"inner": {"size": 3}, "colour": "red", "mode": "a"}


def test_values_arrive_as_the_types_say() -> None:
    made = to_dataclass(
        Outer,
        GOOD
        | {"names": ["x", "y"], "parts": [{"size": 1, "share": 2}], "extra": {"size": 0}, "limit": None, "flag": True},
    )
    assert made == Outer(Inner(3), Colour.RED, "a", ("x", "y"), (Inner(1, 2.0),), Inner(0), None, True)
    assert isinstance(made.parts[0].share, float) and isinstance(made.colour, Colour)
    assert to_dataclass(Outer, GOOD) == Outer(Inner(3), Colour.RED, "a")
    assert [to_dataclass(Outer, GOOD | {"flag": word}).flag for word in ("on", "off")] == [True, False]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"colr": "red"}, "unknown key colr: did you mean colour?"),
        ({"size": 3}, "unknown key size: the keys here are inner, colour, mode"),
        ({"inner": {"size": 3, "shar": 1}}, "unknown key inner.shar: did you mean inner.share?"),
        ({"inner": {}}, "inner.size must be set"),
        ({"inner": 3}, r"inner=3 \(int\) must be a group of keys"),
        ({"inner": {"size": "3"}}, r"inner.size='3' \(str\) must be a whole number$"),
        ({"inner": {"size": 2.6}}, r"inner.size=2.6 \(float\) must be a whole number: use 3"),
        ({"inner": {"size": True}}, r"inner.size=True \(bool\) must be a whole number"),
        ({"inner": {"size": 1, "share": "1e-3"}}, "inner.share='1e-3' .* must be a number"),
        ({"inner": {"size": None}}, "inner.size=None .* must be a whole number"),
        ({"flag": "yes"}, r"flag='?yes'? \(str\) must be true or false"),
        ({"flag": 1}, r"flag=1 \(int\) must be true or false"),
        ({"limit": 1.5}, "limit=1.5 .*: use 2"),
        ({"colour": "bleu"}, "colour='bleu' is not one of red, blue: did you mean blue?"),
        ({"mode": "c"}, "mode='c' is not one of a, b$"),
        ({"names": "x"}, r"names='x' \(str\) must be a list: write names=\[x\]$"),
        ({"names": "x y"}, r"names='x y' \(str\) must be a list: write names=\[...\]$"),
        ({"names": [["x"]]}, r"names\[0\]=\['x'\] \(list\) must be text$"),
        ({"names": [1]}, r"""names\[0\]=1 \(int\) must be text: quote it, 'names\[0\]="1"'"""),
        ({"parts": [{"size": "x"}]}, r"parts\[0\].size='x'"),
        ({"inner": {"size": -1}}, "inner.size=-1 must be at least 0"),
    ],
)
def test_wrong_values_are_one_sentence(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        to_dataclass(Outer, GOOD | change)
    assert "\n" not in str(caught.value)


def test_a_missing_group_names_itself() -> None:
    with pytest.raises(ConfigError, match="inner, colour must be set: 2 of 8 keys are missing"):
        to_dataclass(Outer, {"mode": "a"})


def test_all_keys_are_listed_groups_first() -> None:
    assert keys_of(Outer) == [
        *("inner", "inner.size", "inner.share", "colour", "mode", "names", "parts"),
        *("extra", "extra.size", "extra.share", "limit", "flag"),
    ]


@dataclass(frozen=True)
class Circle:
    """One family of shapes."""

    radius: float
    kind: Literal["circle"] = "circle"


@dataclass(frozen=True)
class Square:
    """Another, with another key."""

    side: float
    corner: Inner | None = None
    kind: Literal["square"] = "square"


@dataclass(frozen=True)
class Drawing:
    shape: Circle | Square
    frame: Square | Circle | None = None


def test_a_union_is_chosen_by_its_tag() -> None:
    circle, square = {"kind": "circle", "radius": 2}, {"kind": "square", "side": 3, "corner": {"size": 1}}
    assert to_dataclass(Drawing, {"shape": circle}) == Drawing(Circle(2.0))
    assert to_dataclass(Drawing, {"shape": square, "frame": circle}) == Drawing(Square(3.0, Inner(1)), Circle(2.0))
    assert to_dataclass(Drawing, {"shape": square, "frame": None}).frame is None


def test_keys_of_a_union_are_those_of_all_its_families_once() -> None:
    shape = ["shape", "shape.radius", "shape.kind", "shape.side", "shape.corner"]
    corner = ["shape.corner.size", "shape.corner.share"]
    assert [key for key in keys_of(Drawing) if key.startswith("shape")] == [*shape, *corner]
    assert len(keys_of(Drawing)) == len(set(keys_of(Drawing))) == 14


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ({"kind": "cirle", "radius": 2}, "shape.kind='cirle' is not one of circle, square: did you mean circle?"),
        ({"kind": None, "radius": 2}, "shape.kind=None is not one of circle, square$"),
        ({"radius": 2}, "shape.kind must be set: use one of circle, square"),
        ({"kind": "circle", "side": 2}, "unknown key shape.side: "),
        ({"kind": "square"}, "shape.side must be set: 1 of 3 keys are missing"),
        ({"kind": "square", "side": "x"}, r"shape.side='x' \(str\) must be a number"),
        ("circle", r"shape='circle' \(str\) must be a group of keys"),
        (None, r"shape=None \(NoneType\) must be a group of keys"),
    ],
)
def test_a_wrong_family_is_one_sentence(shape: object, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        to_dataclass(Drawing, {"shape": shape})


def test_values_that_are_no_mapping() -> None:
    with pytest.raises(ConfigError, match=r"the configuration=\[\] \(list\) must be a group of keys"):
        to_dataclass(Outer, [])
