"""The keys of a config.json: each is used, known to be without effect, or refused by name with what would be lost.

Refused: reading the keys that we know and leaving the others alone, as loaders do: a model of which one key was not
understood computes something else, and nothing says so.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from fp8moe.errors import ConfigError

REQUIRED = object()
# Of every family: what wrote the file, ids of special tokens, defaults of generation, derived sizes.
WITHOUT_EFFECT = (
    *("architectures", "auto_map", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "pretraining_tp", "ep_size", "output_router_logits"),
    *("model_type", "quantization_config", "qk_head_dim"),
)


class Keys:
    """config.json of one model, whose keys are taken one by one; `finish` refuses what is left."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.where = where
        self._values = dict(values)
        self._left = {name for name, value in values.items() if value not in (None, False, [], {}, "")}

    def take(self, name: str, default: Any = REQUIRED) -> Any:
        """The value of a key; `default` where it is missing or null. Raises ConfigError where it is required."""
        self._left.discard(name)
        value = self._values.get(name)
        if value is None:
            if default is REQUIRED:
                raise ConfigError(f"{self.where} lacks {name}, which this family needs: use the released file")
            return default
        return value

    def has(self, name: str) -> bool:
        """Whether a key is there and not null."""
        return self._values.get(name) is not None

    def number(self, name: str, default: Any = REQUIRED) -> Any:
        """A number. Raises ConfigError where it is none."""
        value = self.take(name, default)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ConfigError(f"{self.where}: {name}={value!r} must be a number: use the released file")
        return value

    def whole(self, name: str, default: Any = REQUIRED) -> Any:
        """A whole number. Raises ConfigError where it is none."""
        value = self.number(name, default)
        if value is not None and not isinstance(value, int):
            raise ConfigError(f"{self.where}: {name}={value!r} must be a whole number: use the released file")
        return value

    def divisor(self, name: str, default: Any = REQUIRED) -> Any:
        """A whole number of at least 1, which something is divided by. Raises ConfigError where it is none."""
        value = self.whole(name, default)
        if value < 1:
            raise ConfigError(f"{self.where}: {name}={value} must be at least 1: use the released file")
        return value

    def only(self, name: str, allowed: Collection[Any], lost: str) -> None:
        """Refuse a key whose value is not of `allowed`; a missing or null one means the first."""
        value = self.take(name, next(iter(allowed)))
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
            choices = " or ".join(str(one).lower() if isinstance(one, bool) else str(one) for one in allowed)
            raise ConfigError(f"{self.where}: {name}={value!r} is not supported, {lost} would be lost: use {choices}")

    def finish(self, without_effect: Collection[str] = ()) -> None:
        """Raise ConfigError where a key was neither taken nor is known to be without effect."""
        unknown = sorted(self._left - {*without_effect, *WITHOUT_EFFECT})
        if unknown:
            shown = ", ".join(f"{name}={self._values[name]!r:.60}" for name in unknown[:3])
            raise ConfigError(
                f"{self.where}: {shown} is not supported for model_type={self._values.get('model_type')}, what it asks "
                "for would be lost: take it out if the weights do not depend on it"
            )
