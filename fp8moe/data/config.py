"""What the data are: where the tokens come from, how they are mixed, and what is held out.

Two sources. `stdlib` is the embedded corpus (the Python standard library of the running interpreter), tokenized on the
first run and cached. `indexed` reads token files that already exist, named without their `.bin`/`.idx` ending; several
of them are mixed by `weights`, which are shares of SAMPLES, not of epochs: a small set with a large weight repeats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fp8moe.errors import ConfigError

SOURCES = ("stdlib", "indexed")


@dataclass(frozen=True)
class DataConfig:
    """Validated on construction; raises `ConfigError`.

    source: "stdlib" or "indexed".
    paths: prefixes of indexed token files (`indexed` only).
    weights: one non-negative number a path, any sum; empty means equal weights.
    validation_paths: indexed files to validate on, each in proportion to its size; empty: hold out `validation_share`.
    validation_share: share held out of the training data, by file (`stdlib`) or by document (`indexed`).
    tokenizer: a byte-level tokenizer.json. None: trained on the corpus (`stdlib`), or PREFIX.tokenizer.json where it
        lies beside the indexed files (`indexed`; without one there are no bits per byte).
    vocab_size: ids are below this number; also the size of a tokenizer trained here.
    document_mask: tokens see their own document only, and the first token of a document is not predicted.
    cache_dir: None is `$XDG_CACHE_HOME/fp8moe`, or `~/.cache/fp8moe`.
    """

    source: str = "stdlib"
    paths: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    validation_paths: tuple[str, ...] = ()
    validation_share: float = 0.025
    tokenizer: str | None = None
    vocab_size: int = 4096
    document_mask: bool = False
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ConfigError(f"data.source={self.source!r} is not known: use one of {', '.join(SOURCES)}")
        if self.source == "indexed" and not self.paths:
            raise ConfigError("data.source=indexed needs at least one data.paths entry, got 0: name a PREFIX.bin/.idx")
        if self.source == "stdlib" and (self.paths or self.weights or self.validation_paths):
            raise ConfigError(
                "data.source=stdlib reads no paths, weights or validation_paths, "
                f"got {len(self.paths)}, {len(self.weights)} and {len(self.validation_paths)}: use data.source=indexed"
            )
        if self.vocab_size < 1:
            raise ConfigError(f"data.vocab_size={self.vocab_size} must be at least 1")
        if not 0.0 < self.validation_share <= 0.5:
            raise ConfigError(f"data.validation_share={self.validation_share} is outside (0, 0.5]: 0.025 is usual")
        self._check_weights()

    def _check_weights(self) -> None:
        if not self.weights:
            return
        if len(self.weights) != len(self.paths):
            raise ConfigError(
                f"data.weights has {len(self.weights)} entries and data.paths has {len(self.paths)}: "
                "give one weight a path, or none for equal weights"
            )
        for path, weight in zip(self.paths, self.weights, strict=True):
            if not math.isfinite(weight) or weight < 0:
                raise ConfigError(f"data.weights: {weight} for {path} is not a number >= 0: use 0 to leave it out")
        if sum(self.weights) == 0:
            raise ConfigError(f"data.weights: all {len(self.weights)} are 0: at least one must be above 0")
