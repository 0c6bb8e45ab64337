"""Each impossible setting is one sentence and exit code 2."""

from __future__ import annotations

import dataclasses

import pytest

from fp8moe.data.config import DataConfig
from fp8moe.errors import ConfigError


def test_the_default_is_the_embedded_corpus() -> None:
    assert DataConfig().source == "stdlib"
    with pytest.raises(dataclasses.FrozenInstanceError):
        DataConfig().source = "indexed"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "web"}, "'web' is not known: use one of stdlib, indexed"),
        ({"source": "indexed"}, "got 0"),
        ({"paths": ("a",)}, "got 1, 0 and 0"),
        ({"validation_paths": ("a",)}, "got 0, 0 and 1"),
        ({"source": "indexed", "paths": ("a", "b"), "weights": (1.0,)}, "1 entries and data.paths has 2"),
        ({"source": "indexed", "paths": ("a", "b"), "weights": (1.0, -0.5)}, "-0.5 for b"),
        ({"source": "indexed", "paths": ("a", "b"), "weights": (1.0, float("nan"))}, "nan for b"),
        ({"source": "indexed", "paths": ("a", "b"), "weights": (0.0, 0.0)}, "all 2 are 0"),
        ({"validation_share": 0.0}, "outside"),
        ({"validation_share": 0.6}, "outside"),
        ({"vocab_size": 0}, "vocab_size=0"),
    ],
)
def test_impossible_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        DataConfig(**settings)  # type: ignore[arg-type]
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


def test_possible_settings() -> None:
    DataConfig(source="indexed", paths=("a", "b"), weights=(0.0, 2.0), validation_paths=("c",))
