"""Generation against the plainest way, a forward of everything for each token: caches, ragged batches, MTP, ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fp8moe.errors import ConfigError
from fp8moe.generate import decode
from fp8moe.generate.decode import Completion, GenerationConfig
from fp8moe.generate.sampling import SamplingConfig
from fp8moe.generate.session import Session, Where
from fp8moe.layers.attention import cache
from fp8moe.layers.attention.yarn import YarnConfig
from fp8moe.layers.recipe import Precision
from fp8moe.model.transformer import Transformer
from fp8moe.parallel.dispatch import make_dispatcher
from fp8moe.parallel.mesh import build_mesh
from tests.generate.small import PROMPTS, TIMEOUT, generated, ids, recomputed, small_model
from tests.parallel.ranks import run_ranks

COUNT = 12
YARN = YarnConfig(factor=4.0, original_max_seq_len=16)
FAMILIES: dict[str, dict[str, Any]] = {
    "mla": {},
    "mla without a query latent": {"q_lora_rank": 0},
    "mla, one head, yarn": {"num_heads": 1, "nope_dim": 48, "v_dim": 48, "yarn": YARN},
    "gqa, norms of heads, biases, partial rotary": {
        **{"kind": "gqa", "num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "rope_dim": 16},
        **{"qk_norm": "head", "qkv_bias": True, "o_bias": True},
    },
    "gqa, one key head of three, full norms": {
        **{"kind": "gqa", "num_heads": 3, "num_kv_heads": 1, "head_dim": 32, "rope_dim": 32, "qk_norm": "full"}
    },
    "gqa, windows in every other layer, sinks": {
        **{"kind": "gqa", "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "rope_dim": 16},
        **{"window": 6, "window_layers": "even", "sinks": True},
    },
    "mha, clipped": {
        **{"kind": "gqa", "num_heads": 4, "num_kv_heads": 4, "head_dim": 16, "rope_dim": 16, "clip_qkv": 0.5}
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_with_a_cache_every_token_is_what_it_is_without(family: str) -> None:
    """Ragged prompts together, each as alone; then the same with the MTP module's guesses."""
    model = small_model(**FAMILIES[family])
    expected = [recomputed(model, prompt, COUNT) for prompt in PROMPTS]
    completions, figures = generated(model, PROMPTS, max_tokens=COUNT)
    assert ids(completions) == expected
    assert {one.ended for one in completions} == {"max_tokens"}
    assert (figures.prompt_tokens, figures.new_tokens) == (40, COUNT * 5)
    assert ids(generated(model, PROMPTS, max_tokens=COUNT, mtp=True)[0]) == expected


def test_batches_and_single_prompts_are_alike() -> None:
    model = small_model()
    together = ids(generated(model, PROMPTS, max_tokens=COUNT)[0])
    assert ids(generated(model, PROMPTS, max_tokens=COUNT, batch=2)[0]) == together
    assert [ids(generated(model, [prompt], max_tokens=COUNT)[0])[0] for prompt in PROMPTS] == together


def test_what_stands_behind_a_sequence_is_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries that no token wrote are any finite number."""
    model = small_model()
    expected = ids(generated(model, PROMPTS, max_tokens=COUNT)[0])
    made = cache.LayerCache.__init__

    def full_of_noise(self: cache.LayerCache, rows: int, length: int, width: int, like: Tensor) -> None:
        made(self, rows, length, width, like)
        self.entries.fill_(1e4)

    monkeypatch.setattr(cache.LayerCache, "__init__", full_of_noise)
    assert ids(generated(model, PROMPTS, max_tokens=COUNT)[0]) == expected
    assert ids(generated(model, PROMPTS, max_tokens=COUNT, mtp=True)[0]) == expected


class Guessing:
    """Guesses that are right for some tokens and wrong for others, from the greedy text."""

    def __init__(self, texts: list[list[int]]) -> None:
        self.texts, self.calls = [[*prompt, *text] for prompt, text in zip(PROMPTS, texts, strict=True)], 0
        self.of_the_module: list[tuple[int, int, int]] = []  # (completion, place, its guess of that place's token)

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        advance, start = decode._Batch._advance, decode._Batch._prompt

        def started(batch: Any, one: Any) -> int:
            first = start(batch, one)
            self.of_the_module.append((one.completion.number, one.place + 1, one.draft))
            return first

        def advanced(batch: Any, one: Any, tokens: list[int], draft: int = 0) -> None:
            self.of_the_module.append((one.completion.number, one.place + len(tokens) + 1, draft))
            advance(batch, one, tokens, self.guess(one.completion.number, one.place + len(tokens) + 1))

        monkeypatch.setattr(decode._Batch, "_advance", advanced)
        monkeypatch.setattr(decode._Batch, "_prompt", started)

    def guess(self, number: int, place: int) -> int:
        self.calls += 1
        text = self.texts[number]
        right = text[place] if place < len(text) else 0
        return right if (number + self.calls) % 3 else (right + 1) % 97


def test_right_and_wrong_guesses_give_the_same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the module, whose guesses these replace, guesses what one forward of it over the whole text does."""
    model = small_model()
    expected = [recomputed(model, prompt, COUNT + 3) for prompt in PROMPTS]
    guessing = Guessing(expected)
    guessing.patch(monkeypatch)
    completions, figures = generated(model, PROMPTS, max_tokens=COUNT, mtp=True)
    assert ids(completions) == [text[:COUNT] for text in expected]
    assert 0.4 < figures.accepted / figures.drafts < 0.9
    assert figures.drafts == figures.steps < COUNT * 5 * 0.75
    whole = [guesses(model, text) for text in guessing.texts]
    assert len(guessing.of_the_module) == figures.drafts + len(PROMPTS)
    for number, place, guess in guessing.of_the_module:
        assert guess == whole[number][place - 2], (number, place)


@torch.no_grad()
def guesses(model: Transformer, text: list[int]) -> list[int]:
    """The MTP module's likeliest token two places behind each place of `text` but the last."""
    assert model.mtp is not None and model.embedding is not None and model.norm is not None and model.head is not None
    positions = model.positions(torch.arange(len(text) - 1)[None])
    hidden_TD, _ = model.run_blocks(model.embedding(torch.tensor(text[:-1])), positions)
    guessed, _ = model.mtp(model.norm(hidden_TD).tensor, model.embedding(torch.tensor(text[1:])), positions)
    return model.head(guessed).argmax(-1).tolist()


def test_guesses_change_no_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn tokens are the same with guesses, right or wrong: a sequence draws once a token."""
    model, sampling = small_model(), SamplingConfig(temperature=0.7, top_p=0.9, seed=5)
    drawn = ids(generated(model, PROMPTS, max_tokens=COUNT + 3, sampling=sampling)[0])
    Guessing(drawn).patch(monkeypatch)
    completions, figures = generated(model, PROMPTS, max_tokens=COUNT, mtp=True, sampling=sampling)
    assert ids(completions) == [text[:COUNT] for text in drawn] and figures.accepted > 10
    assert ids(generated(model, PROMPTS[:1], max_tokens=COUNT, sampling=sampling)[0])[0] == drawn[0][:COUNT]
    other = replace(sampling, seed=6)
    assert ids(generated(model, PROMPTS, max_tokens=COUNT, sampling=other)[0]) != ids(completions)


def test_the_mtp_module_sees_what_it_is_trained_on() -> None:
    """Its hidden states from a session, prompt and single tokens, are those of one forward over the whole sequence."""
    model = small_model()
    assert model.mtp is not None and model.embedding is not None and model.norm is not None
    text = torch.randint(97, (12,), generator=torch.Generator().manual_seed(0)).tolist()
    positions = model.positions(torch.arange(11)[None])
    with torch.no_grad():
        hidden_TD, _ = model.run_blocks(model.embedding(torch.tensor(text[:-1])), positions)
        whole, _ = model.mtp(model.norm(hidden_TD).tensor, model.embedding(torch.tensor(text[1:])), positions)
        session = Session(model, 1, 12, mtp=True)
        pieces = []
        for first, last in ((0, 7), (7, 8), (8, 10), (10, 11)):
            where = session.where([0], [first], last - first)
            hidden_BSD = session.forward(session.ids([text[first:last]]), where)
            pieces.append(session.draft(hidden_BSD, session.ids([text[first + 1 : last + 1]]), where)[0])
    torch.testing.assert_close(torch.cat(pieces), whole.tensor, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision, bound", [(Precision.BF16, 0.03), (Precision.FP8, 0.12)])
def test_lower_precisions_stay_close(precision: Precision, bound: float) -> None:
    """Logits token by token beside those of the whole sequence, relative to their norm; FP8 absorbs FP8 weights."""
    model = small_model(precision, init_std=0.05)
    text = torch.randint(97, (1, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model.logits(text)[0].float()
        session = Session(model, 1, 16)
        got = [session.logits(session.forward(text[:, :5], session.where([0], [0], 5))[0])]
        got += [session.logits(session.forward(text[:, i, None], session.where([0], [i], 1))[0]) for i in range(5, 16)]
    error = (torch.cat(got).float() - whole).norm() / whole.norm()
    assert error < bound


def on_ranks(
    mtp: bool, sampling: SamplingConfig, stop: int, prompts: list[list[int]] = PROMPTS, batch: int = 4
) -> list[list[int]]:
    mesh = build_mesh(1, 2, 2, timeout=TIMEOUT)
    model = small_model(dispatcher=make_dispatcher("all_to_all", mesh, 4, max_tokens=1), ep_rank=mesh.ep_rank)
    found = generated(model, prompts, mesh, stop=stop, max_tokens=COUNT, mtp=mtp, sampling=sampling, batch=batch)
    return ids(found[0])


@pytest.mark.parametrize("mtp, temperature", [(False, 0.0), (True, 0.0), (True, 0.8)])
def test_ranks_that_share_experts_give_the_same_tokens(mtp: bool, temperature: float) -> None:
    """5 prompts in batches of 4 and 1 over 2 ranks: one rank is without a sequence of its own in the second."""
    sampling = SamplingConfig(temperature)
    whole = ids(generated(small_model(), PROMPTS, max_tokens=COUNT, sampling=sampling)[0])
    stop = whole[0][3]
    alone = [one[: one.index(stop) + 1 if stop in one else None] for one in whole]
    assert len({len(one) for one in alone}) > 1, "a sequence ends before the others"
    for found in run_ranks(on_ranks, 2, mtp, sampling, stop):
        assert found == alone


SAMPLES = [PROMPTS[number] for number in (0, 1, 0, 2, 0, 4, 0)]  # of two ranks one has a prompt, the other three


@pytest.mark.parametrize("family", ["mla", "gqa, windows in every other layer, sinks"])
@pytest.mark.parametrize("sampling", [SamplingConfig(), SamplingConfig(1.0), SamplingConfig(0.9, 0.8)])
def test_samples_of_a_prompt_share_its_forward(
    family: str, sampling: SamplingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each draws is what it draws alone, with a forward of its own."""
    model, asked = small_model(**FAMILIES[family]), [PROMPTS[3], PROMPTS[0], PROMPTS[3], PROMPTS[3], PROMPTS[1]]
    alone = ids(generated(model, asked, max_tokens=COUNT, sampling=sampling, batch=1)[0])
    through: list[int] = []
    forward = Session.forward

    def counted(self: Session, ids_BS: Tensor, where: Where) -> Tensor:
        through.extend([ids_BS.shape[1]] * len(ids_BS) * where.is_first)
        return forward(self, ids_BS, where)

    monkeypatch.setattr(Session, "forward", counted)
    completions, figures = generated(model, asked, max_tokens=COUNT, sampling=sampling)
    assert ids(completions) == alone and through == [23, 3, 11]
    assert (figures.prompt_tokens, figures.new_tokens) == (83, COUNT * 5)
    assert sampling.temperature == 0 or len({tuple(alone[number]) for number in (0, 2, 3)}) == 3
    assert ids(generated(model, asked, max_tokens=COUNT, sampling=sampling, mtp=True)[0]) == alone


def test_ranks_with_different_numbers_of_prompts_keep_step() -> None:
    sampling = SamplingConfig(1.0)
    alone = ids(generated(small_model(), SAMPLES, max_tokens=COUNT, sampling=sampling, batch=1)[0])
    for found in run_ranks(on_ranks, 2, False, sampling, -1, SAMPLES, 8):
        assert found == alone


def test_a_stop_ends_its_sequence_alone() -> None:
    model = small_model()
    expected = [recomputed(model, prompt, COUNT) for prompt in PROMPTS]
    stop = expected[0][2]
    completions, _ = generated(model, PROMPTS, stop=stop, max_tokens=COUNT)
    for one, text in zip(completions, expected, strict=True):
        length = text.index(stop) + 1 if stop in text else COUNT
        assert one.ids == text[:length] and one.ended == ("stop" if stop in text else "max_tokens")


@pytest.mark.parametrize("mtp", [False, True])
def test_a_context_that_is_full_ends_a_sequence(mtp: bool) -> None:
    model = small_model(max_seq_len=24)
    completions, _ = generated(model, PROMPTS, max_tokens=COUNT + 2, mtp=mtp)
    assert [(len(one.ids), one.ended) for one in completions] == [
        *((14, "max_tokens"), (13, "context"), (14, "max_tokens"), (1, "context"), (14, "max_tokens")),
    ]


@pytest.mark.parametrize("prompts, options, words", [
    ([[1], []], {}, r"^prompt 2 is empty: give at least one character$"),
    ([[1] * 64], {}, r"^prompt 1 has 64 tokens and the model's context, model\.max_seq_len, is 64: use at most 63$"),
    ([[1]], {"mtp": True}, r"^the model has no MTP module, model\.mtp_depth=0: leave --mtp out$"),
])  # fmt: skip
def test_what_can_not_be_continued_is_one_sentence(
    prompts: list[list[int]], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        generated(small_model(mtp_depth=0), prompts, **options)


@pytest.mark.parametrize("change", [{"max_tokens": 0}, {"batch": 0}, {"max_tokens": 1.5}])
def test_impossible_settings_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"generation\.{next(iter(change))}="):
        GenerationConfig(**change)


def test_the_model_trains_on_where_it_did() -> None:
    model: Transformer = small_model().train()
    generated(model, PROMPTS[:1], max_tokens=2)
    assert model.training and Completion(0, [1]).ended is None
