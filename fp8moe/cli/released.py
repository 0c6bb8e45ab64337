"""The configuration of a run with a released model: the defaults, and what its config.json says."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from fp8moe.cli.compose import Composed, composed, plain_values, tree_of
from fp8moe.interop.hf_model import HfModel


def configuration(model: HfModel, tokenizer: Path | None) -> Composed:
    """The defaults of a run with this model, on the embedded corpus until it is given another."""
    return composed(settings_of(model, tokenizer))


def settings_of(model: HfModel, tokenizer: Path | None) -> dict[str, object]:
    """The same as a tree of settings."""
    tree = tree_of([])
    tree["model"] = plain_values(asdict(model.config))
    tree["name"] = model.directory.folder.resolve().name or "imported"
    tree["seq_len"] = min(4096, model.config.max_seq_len)
    tree["data"] |= {"vocab_size": model.config.vocab_size, "tokenizer": None if tokenizer is None else str(tokenizer)}
    return tree
