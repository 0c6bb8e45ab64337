"""The model card of an export: what was trained, from the checkpoint's own figures."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from fp8moe.cli.compose import to_dataclass
from fp8moe.interop.card import model_card
from fp8moe.interop.export_hf import Export
from fp8moe.interop.families import FAMILIES
from fp8moe.model.config import ModelConfig

STATE: dict[str, Any] = {
    "step": 300,
    "consumed": 4800,
    "seq_len": 2048,
    "optimizer": "adamw",
    "commit": "abc",
    "versions": {"torch": "2.9", "fp8moe": "1.0"},
    "config": {
        "init_from": "/a/base",
        "precision": {"mode": "fp8"},
        "optimizer": {"schedule": {"peak": 3e-4}},
        "batch": {"sequences": 16},
    },
}


def rows(state: dict[str, Any], name: str = "dsv3_671b", family: str = "deepseek_v3") -> dict[str, str]:
    """The table of the card of such a checkpoint."""
    config = to_dataclass(ModelConfig, yaml.safe_load(Path(f"configs/model/{name}.yaml").read_text()), "model")
    stored: Any = SimpleNamespace(state=state)
    text = model_card(Export(stored, FAMILIES[family], config, "bf16", None), "mine", ["One.", "Two."])
    assert text.startswith("---\nlibrary_name: transformers\n---\n\n# mine\n\n| | |\n|---|---|\n")
    assert text.endswith("\n\nWeights in BF16.\n- One.\n- Two.\n")
    found = (line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ") and line != "| | |")
    return {key: value for key, value in found}


def test_it_says_what_the_checkpoint_holds() -> None:
    found = rows(STATE)
    assert found["trained"] == "300 steps, 9,830,400 tokens in sequences of 2048"  # 4,800 of them
    assert found["begun from"] == "base" and found["precision of the training"] == "fp8"
    assert found["optimizer"] == "adamw, peak learning rate 0.0003" and found["batch"] == "16 sequences"
    assert (found["written by"], found["commit"]) == ("torch 2.9, fp8moe 1.0", "abc")
    total, active, mtp = (int(word.split()[0].replace(",", "")) for word in found["parameters"].split(", "))
    assert 670e9 < total < 685e9 and 36e9 < active < 38e9 and 11e9 < mtp < 12e9, "DeepSeek-V3 report, section 4.2"


def test_what_it_does_not_hold_is_unknown() -> None:
    least = {"step": 0, "consumed": 0, "seq_len": 64, "optimizer": "muon", "imported_from": "/b/theirs"}
    found = rows(least, "olmoe_7b", "olmoe")
    assert found["trained"] == "0 steps, 0 tokens in sequences of 64" and found["begun from"] == "theirs"
    assert found["optimizer"] == "muon, peak learning rate unknown" and found["batch"] == "unknown sequences"
    assert {found[key] for key in ("precision of the training", "data", "written by", "commit")} == {"unknown"}
    assert "MTP" not in found["parameters"]
    assert rows({**least, "imported_from": None}, "olmoe_7b", "olmoe")["begun from"] == "random weights"
