"""The benchmark of context extension: its text asks for what it states, and two short runs go all the way."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import long_context
from benchmarks.needles import FILLER, KEYS, VOCABULARY, WORDS, document, num_bytes, tokens


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_document_states_each_fact_once_and_asks_for_all_of_them(depth: float) -> None:
    for seed in range(20):
        words = document(128, np.random.default_rng(seed), needle=("C", depth))
        body, questions = words[: -2 * len(KEYS)], words[-2 * len(KEYS) :]
        facts = [word for word in body if word not in FILLER]
        assert len(words) == 128 and sorted(fact[0] for fact in facts) == list(KEYS)
        assert questions[0] == "C?" and body[round(depth * (len(body) - 1))] == questions[1]
        assert dict(zip(questions[::2], questions[1::2], strict=True)) == {f"{fact[0]}?": fact for fact in facts}
    assert [WORDS[number] for number in tokens(words)] == words and max(tokens(list(WORDS))) == VOCABULARY - 1
    assert num_bytes(words) == len(" ".join(words)) + 1


def test_rounds_repeat_the_facts() -> None:
    words = document(128, np.random.default_rng(0), rounds=2)
    assert len(words) == 128 and {*words[:64]} - {*FILLER} == {*words[64:]} - {*FILLER}


def test_the_whole_path_in_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(long_context, "LENGTHS", (64, 256))
    monkeypatch.setattr(long_context, "DEPTHS", (0.0, 1.0))
    out = tmp_path / "out.json"
    assert (
        long_context.main(["--device", "cpu", "--quick", "--folder", str(tmp_path / "runs"), "--json", str(out)]) == 0
    )
    records = json.loads(out.read_text())
    models = ["before", "YaRN, untrained", "after"]
    assert [r["name"] for r in records if r["metric"] == "bits per byte"] == models
    found = [r for r in records if r["metric"] == "needles found"]
    assert len(found) == 3 * 2 * 2 and all(0 <= r["value"] <= 1 for r in found)
    assert [r["name"] for r in records if r["metric"] == "training"] == ["before", "after"]
    printed, picture = capfd.readouterr().out, out.with_suffix(".svg").read_text()
    assert all(f"needles found, {name}" in printed and f"needles found, {name}" in picture for name in models)
    assert "begins from the weights of" in printed and picture.count("<rect") == 1 + len(found)
