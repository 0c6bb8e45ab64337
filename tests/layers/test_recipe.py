"""The recipe: dtypes, what FP8 leaves alone, and names that configurations use."""

from __future__ import annotations

import pytest
import torch

from fp8moe.layers.recipe import DEFAULT_RECOMPUTE, FULL_RECOMPUTE, Precision, Recipe, Recompute


@pytest.mark.parametrize("precision, dtype, fp8, unquantized", [
    (Precision.FP32, torch.float32, False, Precision.FP32),
    (Precision.BF16, torch.bfloat16, False, Precision.BF16),
    (Precision.FP8, torch.bfloat16, True, Precision.BF16),
])  # fmt: skip
def test_what_a_precision_means(precision: Precision, dtype: torch.dtype, fp8: bool, unquantized: Precision) -> None:
    recipe = Recipe(precision, frozenset({Recompute.NORM}))
    assert (recipe.dtype, recipe.fp8) == (dtype, fp8)
    assert recipe.unquantized == Recipe(unquantized, frozenset({Recompute.NORM}))


def test_recomputation_by_default_and_in_full() -> None:
    assert Recipe(Precision.FP8).recompute == DEFAULT_RECOMPUTE == {"swiglu"}
    assert {"norm", "mla_up", "swiglu"} == FULL_RECOMPUTE
