"""precision.scales: which operands of a step's products have power-of-two scales, in every layer."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
import torch

from fp8moe.kernels.fp8 import Fp8Tensor
from fp8moe.layers import linear, moe
from fp8moe.layers.dispatch import LocalDispatcher
from fp8moe.layers.recipe import FULL_RECOMPUTE, Precision, Recipe, Scales
from fp8moe.model.transformer import Transformer, init_weights
from tests.model.passes import CONFIG, equal, step


def build(scales: Scales, recompute: Any = FULL_RECOMPUTE) -> Transformer:
    recipe = Recipe(Precision.FP8, recompute, scales)
    model = Transformer(CONFIG, recipe, LocalDispatcher(CONFIG.experts.num_experts))
    init_weights(model, seed=3, ep_rank=0)
    return model


def is_power_of_two(x: Fp8Tensor) -> bool:
    return bool((torch.frexp(x.scale).mantissa == 0.5).all())


def kinds(scales: Scales, monkeypatch: pytest.MonkeyPatch) -> dict[str, set[bool]]:
    """Operand of a product -> whether its scales were powers of two, in one step of the whole model."""
    seen: defaultdict[str, set[bool]] = defaultdict(set)

    def watched(module: Any, name: str, operands: tuple[str, str]) -> None:
        inner = getattr(module, name)

        def run(a: Fp8Tensor, b: Fp8Tensor, *args: Any, **kwargs: Any) -> Any:
            adds = "accumulate" in kwargs
            for operand, x in zip(operands, (a, b), strict=True):
                seen[f"{name} {operand}{' added' if adds else ''}"].add(is_power_of_two(x))
            return inner(a, b, *args, **kwargs)

        monkeypatch.setattr(module, name, run)

    watched(linear, "gemm", ("a", "b"))
    watched(moe, "grouped_gemm", ("a", "b"))
    watched(moe, "grouped_wgrad", ("dy", "x"))
    step(build(scales))
    return dict(seen)


def test_every_scale_is_a_power_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set().union(*kinds(Scales.POWER_OF_TWO, monkeypatch).values()) == {True}


def test_fp32_scales_stand_wherever_the_format_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    found = kinds(Scales.FP32, monkeypatch)
    assert found["gemm b"] == found["grouped_gemm b"] == {False}, "weights"
    assert found["gemm a added"] == {False}, "columns of gradients"
    assert found["gemm b added"] == {True, False}, "columns of 12 bits and of SwiGLU's cached input stay powers of two"
    assert found["grouped_gemm a"] == {True, False}, "rows and gradients that travelled, and SwiGLU's"
    assert found["grouped_wgrad x"] == {True}, "requantized, and SwiGLU's columns"
    assert found["grouped_wgrad dy"] == {True, False}, "requantized, and SwiGLU's backward"


def test_the_recipe_mixes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    found = kinds(Scales.RECIPE, monkeypatch)
    assert found["gemm b"] == found["grouped_gemm b"] == {False}
    assert found["gemm a"] == {True, False}


@pytest.mark.parametrize("scales", list(Scales))
def test_recomputation_changes_no_bit(scales: Scales) -> None:
    assert equal(step(build(scales, frozenset())), step(build(scales)))


def test_the_three_differ_and_the_default_is_the_recipe() -> None:
    assert Recipe(Precision.FP8).scales is Scales.RECIPE
    made = [step(build(scales)) for scales in Scales]
    assert not any(equal(made[i], made[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("usual", [False, True])
def test_what_a_cast_asks_the_recipe(usual: bool) -> None:
    recipe = Recipe(Precision.FP8)
    assert recipe.power_of_two(usual) is usual
    assert replace(recipe, scales=Scales.FP32).power_of_two(usual) is False
    assert replace(recipe, scales=Scales.POWER_OF_TWO).power_of_two(usual) is True
