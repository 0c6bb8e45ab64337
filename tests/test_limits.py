"""Every field of every configuration class, found from TrainConfig's types, with values that it must not take."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

import pytest
import torch

from fp8moe.cli.compose import compose
from fp8moe.limits import Range, check_fields
from fp8moe.train.config import TrainConfig
from fp8moe.train.optimizer.config import MOST_BF16_BETA

YARN = "model.attention.yarn={factor: 40.0}"
EXAMPLE = compose(["data=indexed", "data.paths=[a]", "data.weights=[1.0]", "parallel.layout=[4]", YARN]).config
GROUPED = compose(["model=qwen3_30b_a3b"]).config

# What is legal of the values below, by field; nothing else may be accepted.
ZERO = {
    "mtp_depth", "mtp_weight", "num_dense_layers", "num_shared", "q_lora_rank", "aux_loss_alpha", "bias_gamma",
    "mscale", "mscale_all", "layout", "beta1", "beta2", "muon_beta", "weight_decay", "warmup_steps", "factor",
    "bias_gamma_until", "mtp_weight_until", "mtp_weight_after", "fp8_every", "experts_every", "ramp_samples", "every",
    "keep_every", "seed", "max_skipped_steps", "consistency_every", "completions", "init_perturbation", "fim_rate",
    "prefetch", "held_out_count", "dynamic_rounds", "kl", "reference_every", "server_wait", "stale",
}  # fmt: skip
NOT_ZERO = {"YarnConfig.factor", "LoggingConfig.every", "EmaConfig.every"}
HUGE = {"until": 1e18, "clip_norm": 1e30, "rope_theta": 1e12, "seed": 10**12, "ramp_samples": 10**12}
NUMBERS = (math.nan, math.inf, -math.inf, -1, -0.5, 0, 0.0, 1e12, 10**12, 1e30, 10**30, 10**400, True, "1", None, b"1")
TEXTS = ("", " ", "a\nb", "a\0b", "\udc80", 3, 0.5, True, None, ("a",))
OTHERS = (3, 0.5, math.nan, "none such", "a\nb", "", None, [], {}, b"1")


@dataclass(frozen=True)
class Case:
    owner: Any
    name: str
    value: Any
    legal: bool

    def __str__(self) -> str:
        return f"{type(self.owner).__name__}.{self.name}={self.value!r:.20}"


def parts(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def classes_of(cls: type) -> set[type]:
    """`cls` and the dataclasses in its fields' types, in tuples and unions too."""
    found = {cls}
    for hint in typing.get_type_hints(cls).values():
        for part in parts(hint):
            inner = typing.get_args(part)[0] if typing.get_origin(part) is tuple else part
            if dataclasses.is_dataclass(inner) and isinstance(inner, type):
                found |= classes_of(inner)
    return found


def examples_of(config: Any) -> Iterator[Any]:
    """`config` and the configurations in it."""
    yield config
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for inner in value if isinstance(value, tuple) else (value,):
            if dataclasses.is_dataclass(inner):
                yield from examples_of(inner)


def number_is_legal(owner: Any, name: str, value: Any, kind: type) -> bool:
    """By the lists above; only a number of the right type can be."""
    if not isinstance(value, int | kind) or isinstance(value, bool):
        return False
    if value == 0:
        return name in ZERO and f"{type(owner).__name__}.{name}" not in NOT_ZERO
    return 0 < value <= HUGE.get(name, 0)


def cases(owner: Any) -> Iterator[Case]:
    """Every field of `owner` with every value that its type calls for; a tuple also with each as its only item."""
    for name, hint in typing.get_type_hints(type(owner)).items():
        optional, kind = type(None) in parts(hint), parts(hint)[0]
        if typing.get_origin(kind) is not tuple:
            for value, legal in values(owner, name, kind):
                yield Case(owner, name, value, optional if value is None else legal)
            continue
        yield from (Case(owner, name, value, optional and value is None) for value in ("a", 3, None, ["a"]))
        for value, legal in values(owner, name, typing.get_args(kind)[0]):
            yield Case(owner, name, (value,), legal)


def values(owner: Any, name: str, kind: Any) -> Iterator[tuple[Any, bool]]:
    if kind in (int, float):
        yield from ((value, number_is_legal(owner, name, value, kind)) for value in NUMBERS)
    elif kind is str:
        yield from ((value, False) for value in TEXTS)
    else:
        known = kind is bool or typing.get_origin(kind) is Literal or dataclasses.is_dataclass(kind)
        assert known or issubclass(kind, Enum), f"{name}: {kind} is a type that this test does not know"
        yield from ((value, False) for value in OTHERS)


EXAMPLES = list({type(one): one for example in (GROUPED, EXAMPLE) for one in examples_of(example)}.values())


def test_there_is_an_example_of_every_class() -> None:
    assert {type(example) for example in EXAMPLES} == classes_of(TrainConfig) and len(EXAMPLES) >= 16


@pytest.mark.parametrize("owner", EXAMPLES, ids=lambda owner: type(owner).__name__)
def test_a_field_takes_what_is_listed_and_refuses_the_rest_in_one_sentence(owner: Any) -> None:
    wrong = []
    for case in cases(owner):
        try:
            made = dataclasses.replace(owner, **{case.name: case.value})
        except ValueError as error:
            text = str(error)
            if case.legal or "\n" in text or case.name not in text or not text.isprintable() or len(text) > 250:
                wrong.append(f"{case}: {text}")
        else:
            if not case.legal or getattr(made, case.name) != case.value:
                wrong.append(f"{case}: accepted")
    assert wrong == []


@dataclass(frozen=True)
class Sizes:
    """All that a field can be told."""

    count: int = 3
    share: float = 0.5
    open: float = 2.0
    limit: int | None = None
    parts: tuple[float, ...] = ()
    text: str = "a"
    mode: Literal["a", "b", "c"] = "a"

    def __post_init__(self) -> None:
        count, share = Range(least=2, most=8), Range(least=0, below=1)
        limits = {"open": Range(above=1, most=9), "limit": Range(least=1, use="use 7"), "parts": Range(above=0)}
        check_fields(self, "group", count=count, share=share, **limits)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"count": 1}, "group.count=1 must be at least 2: use 2 or more"),
        ({"count": 9}, "group.count=9 must be at most 8: use 8 or less"),
        ({"count": 2.0}, "group.count=2.0 must be a whole number, at least 2 and at most 8: use 3"),
        ({"count": True}, "group.count=True must be a whole number, at least 2 and at most 8: use 3"),
        ({"count": None}, "group.count=None must be a whole number, at least 2 and at most 8: use 3"),
        ({"share": 1}, "group.share=1 must be at least 0 and below 1: use 0.5"),
        ({"share": math.nan}, "group.share=nan must be a number, at least 0 and below 1: use 0.5"),
        ({"share": -math.inf}, "group.share=-inf must be at least 0 and below 1: use 0 or more"),
        ({"open": 1.0}, "group.open=1.0 must be above 1: use 2.0"),
        ({"open": math.inf}, "group.open=inf must be at most 9: use 9 or less"),
        ({"limit": 0}, "group.limit=0 must be at least 1: use 7"),
        ({"limit": 2**31}, "group.limit=2147483648 must be at most 2147483647: use 2147483647 or less"),
        ({"text": " "}, "group.text=' ' must not be empty: use a"),
        ({"text": "a\n\tb"}, "group.text='a\\n\\tb' must be one line without control characters: use a b"),
        ({"text": 3}, "group.text=3 must be text: use a"),
        ({"mode": "d"}, "group.mode='d' does not exist: use a, b or c"),
        ({"mode": "d" * 90}, f"group.mode='{'d' * 56}... does not exist: use a, b or c"),
    ],
)  # fmt: skip
def test_the_sentence_names_key_value_rule_and_nearest_value(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        Sizes(**change)
    assert str(caught.value) == sentence


def test_the_bounds_themselves_are_legal() -> None:
    for change in (
        {"count": 2},
        {"count": 8},
        {"share": 0},
        {"limit": 2**31 - 1},
        {"limit": None},
        {"parts": (1, 0.5)},
    ):
        Sizes(**change)  # type: ignore[arg-type]
    Sizes(open=math.nextafter(1.0, 2.0), share=math.nextafter(1.0, 0.0))


def test_a_number_without_a_range_and_a_range_without_a_field_are_defects() -> None:
    @dataclass(frozen=True)
    class Forgotten:
        count: int = 3

    with pytest.raises(AssertionError, match=r"group\.count is a number and needs a Range"):
        check_fields(Forgotten(), "group")
    with pytest.raises(AssertionError, match=r"Forgotten has no .*size"):
        check_fields(Forgotten(), "group", count=Range(), size=Range())


RULES = [  # between settings, and those whose reason is not plain from the range
    (["optimizer.beta2=0.999"], r"beta2=0\.999 is too close to 1 for BF16 moments, .* use .*moments=fp32, or .*0\.99 "),
    (["optimizer.beta1=0.9965"], "beta1=0.9965 is too close to 1"),
    (["optimizer=muon", "optimizer.muon_beta=0.9965"], "muon_beta=0.9965 is too close to 1"),
    (["lr_schedule=cosine", "optimizer.schedule.phases.0.until=1e13"], r"phases.0..until=1.* is a share .*: use 1\.0"),
    (["optimizer.schedule.mtp_weight_until=1.5"], r"mtp_weight_until=1\.5 is a share of the run"),
    (["optimizer.schedule.unit=tokens"], r"until=1\.0 counts tokens under unit=tokens .*: use unit=share"),
    (["model.attention.yarn={beta_fast: 0.5}"], r"beta_fast=0\.5 must not be below beta_slow=1\.0.*: use 32\.0 and"),
    (["name=../../outside"], "name='../../outside' must be one part of a path, .*: use 'outside'"),
    (["name=.."], r"name='\.\.' must be one part of a path, .*: use 'run'"),
    ([f"name='{'é' * 101}'"], "must be one part of a path, of at most 200 bytes"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "says"), RULES)
def test_rules_between_settings(settings: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        compose(settings)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 260


def test_the_last_legal_values_of_those_rules() -> None:
    compose(["optimizer.beta2=0.9961", "optimizer.muon_beta=0.9965", f"name='{'é' * 100}'", "data.document_mask=true"])
    compose(["optimizer.beta2=0.999", "optimizer.moments=fp32", "optimizer.schedule.bias_gamma_until=1.0"])


def test_a_bf16_moment_falls_up_to_the_bound_and_not_above() -> None:
    """All significands of BF16, multiplied in FP32 and rounded to nearest, as the optimizer does."""
    moments = torch.arange(128, 256).div(128).bfloat16()
    for beta, all_fall in ((0.95, True), (MOST_BF16_BETA, True), (MOST_BF16_BETA + 1e-6, False), (0.999, False)):
        assert bool(((moments.float() * beta).bfloat16() < moments).all()) is all_fall, beta
