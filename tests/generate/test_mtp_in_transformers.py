"""The MTP module of an export in transformers' own `generate(use_mtp=True)`: the same tokens, the same guesses.

Its implementation is independent of ours: it joins [embedding, hidden state behind the final norm], and numbers places
by the embedded token where ours takes the hidden state's, which is alike for a rotation by differences.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

from fp8moe.__main__ import main
from fp8moe.generate import decode
from fp8moe.generate.text import Vocabulary

PROMPTS = ["delta = ", "qz;(1", "alpha = beta(gamma, 1)\nself"]
COUNT = 24


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "out"
    assert main(["export", str(run), str(out), "--precision", "fp32"]) == 0
    return out


@pytest.fixture
def theirs(exported: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class of transformers; MTP is layer 2 of these files, and 61 in its list of what is not the main model's."""
    monkeypatch.setattr(DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.2\..*"])
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32, attn_implementation="eager")
    model.generation_config.eos_token_id = None
    return model.eval()


def kept(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, of: Callable[..., Tensor]) -> list[Tensor]:
    """What `of` finds in each call of a method: of its result, its instance and its arguments."""
    found: list[Tensor] = []
    original = getattr(owner, name)

    def called(self: Any, *arguments: Any, **options: Any) -> Any:
        result = original(self, *arguments, **options)
        found.append(of(result, self, *arguments))
        return result

    monkeypatch.setattr(owner, name, called)
    return found


@pytest.mark.parametrize("from_the_export", [False, True])
def test_tokens_and_guesses_are_those_of_transformers(
    from_the_export: bool, run: Path, exported: Path, theirs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = kept(monkeypatch, decode._Batch, "_guess", lambda _, batch, hidden_BD: batch._session.logits(hidden_BD)[0])
    guesses = kept(monkeypatch, MtpModel, "forward", lambda found, *_: found[1][0, -1])
    words = [
        "--max-tokens",
        str(COUNT),
        "--ignore-end",
        "--mtp",
        "precision=fp32",
        "--json",
        str(tmp_path / "out.json"),
    ]
    vocabulary, accepted, drafts = Vocabulary(exported / "tokenizer.json", 300), 0, 0
    for prompt in PROMPTS:
        ours.clear(), guesses.clear()
        ids = vocabulary.encode(prompt)
        with torch.no_grad():
            whole = theirs.generate(torch.tensor([ids]), use_mtp=True, max_new_tokens=COUNT, do_sample=False)
        assert main(["generate", str(exported if from_the_export else run), "--prompt", prompt, *words]) == 0
        found = json.loads((tmp_path / "out.json").read_text())
        assert found["completions"][0]["ids"] == whole[0, len(ids) :].tolist()
        assert min(len(ours), len(guesses)) >= COUNT // 2 and abs(len(ours) - len(guesses)) <= 1, "of the last, or not"
        for mine, other in zip(ours, guesses, strict=False):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-4)
        accepted, drafts = accepted + found["figures"]["accepted"], drafts + found["figures"]["drafts"]
    assert 0 < accepted < drafts, "guesses are right and wrong"


def test_the_other_order_of_the_join_would_show(
    run: Path, exported: Path, theirs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guesses = kept(monkeypatch, MtpModel, "forward", lambda found, *_: found[1][0, -1])
    with torch.no_grad():
        for first in (False, True):
            theirs.config.mtp_hidden_states_first = first
            theirs.generate(torch.tensor([[5, 3, 90]]), use_mtp=True, max_new_tokens=2, do_sample=False)
    assert (guesses[0] - guesses[len(guesses) // 2]).abs().max() > 0.1
