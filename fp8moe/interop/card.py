"""The model card of an export: what the model is, how it was trained, what was written; from the checkpoint alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fp8moe.data.identity import short
from fp8moe.interop.export_hf import Export
from fp8moe.model.flops import count_parameters


def model_card(export: Export, name: str, said: list[str]) -> str:
    """README.md of the directory. said: sentences on what was written."""
    state, config = export.stored.state, export.stored.state.get("config", {})
    counts = count_parameters(export.config)
    tokens = state["consumed"] * state["seq_len"]
    versions = ", ".join(f"{package} {version}" for package, version in state.get("versions", {}).items())
    rows = {
        "family": export.family.model_type,
        "parameters": f"{counts.total:,}, {counts.active:,} active a token"
        + (f", {counts.mtp:,} in the MTP module" if counts.mtp else ""),
        "trained": f"{state['step']} steps, {tokens:,} tokens in sequences of {state['seq_len']}",
        "begun from": Path(config.get("init_from") or state.get("imported_from") or "random weights").name,
        "precision of the training": _of(config, "precision", "mode"),
        "optimizer": f"{state['optimizer']}, peak learning rate {_of(config, 'optimizer', 'schedule', 'peak')}",
        "batch": f"{_of(config, 'batch', 'sequences')} sequences",
        "data": ", ".join(f"{key} {short(value)}" for key, value in (state.get("data") or {}).items()) or "unknown",
        "written by": versions or "unknown",
        "commit": state.get("commit") or "unknown",
    }
    table = [f"| {key} | {value} |" for key, value in rows.items()]
    lines = ["---", "library_name: transformers", "---", "", f"# {name}", "", "| | |", "|---|---|", *table, ""]
    return "\n".join([*lines, f"Weights in {export.output.upper()}.", *(f"- {sentence}" for sentence in said), ""])


def _of(config: Any, *keys: str) -> Any:
    for key in keys:
        config = config.get(key, "unknown") if isinstance(config, dict) else "unknown"
    return config
