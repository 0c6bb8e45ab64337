"""Scores against sums by hand over the logits of whole sequences, and against the model's own loss."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from fp8moe.data.tokenizer import train_tokenizer
from fp8moe.errors import DataError
from fp8moe.generate.scoring import (
    Question,
    choice_tokens,
    read_questions,
    score_choices,
    score_text,
    windows,
)
from fp8moe.generate.text import Vocabulary
from fp8moe.layers.recipe import Precision
from fp8moe.model.transformer import Transformer
from fp8moe.parallel.dispatch import make_dispatcher
from fp8moe.parallel.mesh import Mesh, build_mesh
from tests.generate.small import TIMEOUT, VOCABULARY, alone, small_model
from tests.model.batches import Tokens
from tests.parallel.ranks import run_ranks

TEXT = torch.randint(VOCABULARY, (41,), generator=torch.Generator().manual_seed(2)).numpy()
WHOLE = np.zeros(1, dtype=np.int64)
QUESTIONS = [
    Question("the other", ("thing", "stop the stop", "e"), 0),
    Question("then: ", ("é", "the other thing then the stop"), 1),
    Question("", ("then", "é"), 1),
]


def scored(model: Transformer, mesh: Mesh, starts: np.ndarray = WHOLE, batch: int = 3, mask: bool = False) -> tuple:
    strings = [b"x" * (i % 3) for i in range(VOCABULARY)]
    score = score_text(model, TEXT, starts, mesh, seq_len=8, batch=batch, document_mask=mask, strings=strings)
    return score.nats, score.tokens, score.num_bytes


def test_perplexity_is_exp_of_the_models_loss_on_the_same_tokens() -> None:
    model = small_model()
    score = score_text(model, TEXT, WHOLE, alone(), seq_len=40, batch=2, document_mask=False, strings=None)
    ids = torch.from_numpy(TEXT)[None]
    with torch.no_grad():
        loss = model(Tokens(ids[:, :-1], ids[:, 1:], torch.arange(40)[None])).main / 40
    assert score.tokens == 40 and score.bits_per_byte is None
    assert score.perplexity == pytest.approx(math.exp(loss), rel=1e-5)


@pytest.mark.parametrize("seq_len, batch", [(8, 1), (8, 4), (7, 3), (64, 2)])
def test_windows_predict_every_token_but_the_first_once(seq_len: int, batch: int) -> None:
    model, nats, ids = small_model(), 0.0, torch.from_numpy(TEXT)
    for first in range(0, 40, seq_len):
        piece = ids[first : first + seq_len + 1]
        with torch.no_grad():
            nats += float(functional.cross_entropy(model.logits(piece[None, :-1])[0], piece[1:], reduction="sum"))
    strings = [b"x" * (i % 3) for i in range(VOCABULARY)]
    score = score_text(model, TEXT, WHOLE, alone(), seq_len=seq_len, batch=batch, document_mask=False, strings=strings)
    num_bytes = sum(int(one) % 3 for one in TEXT[1:])
    assert (score.tokens, score.num_bytes) == (40, num_bytes)
    assert score.nats == pytest.approx(nats, rel=1e-5)
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert sum(len(one.tokens) - 1 for one in windows(TEXT, WHOLE, seq_len)) == 40


def test_documents_are_kept_apart_where_the_run_did() -> None:
    """With the mask, documents score as each alone, and the first token of one is not predicted."""
    model, starts = small_model(), np.array([0, 3, 16, 30])
    nats, tokens, _ = scored(model, alone(), starts, mask=True)
    expected = [
        scored_piece(model, first, last)
        for first, last in ((0, 3), (3, 9), (8, 16), (16, 17), (16, 25), (24, 30), (30, 33), (32, 41))
    ]
    assert tokens == 37 and nats == pytest.approx(sum(expected), rel=1e-5)
    assert scored(model, alone(), starts)[:2] == pytest.approx(scored(model, alone())[:2])


def scored_piece(model: Transformer, first: int, last: int) -> float:
    piece = torch.from_numpy(TEXT[first:last])
    if len(piece) < 2:
        return 0.0
    with torch.no_grad():
        return float(functional.cross_entropy(model.logits(piece[None, :-1])[0], piece[1:], reduction="sum"))


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(["the other thing", "then the stop"] * 9, 280).save(str(path))
    return Vocabulary(path, 300)


def by_hand(model: Transformer, vocabulary: Vocabulary, text: str, choice: str) -> float:
    """The log-likelihood of `choice`, whose tokens end the text behind an end-of-text token, one by one."""
    ids = [vocabulary.end_of_text, *vocabulary.encode(text)]
    count = len(vocabulary.encode(text)) - len(vocabulary.encode(text.removesuffix(choice).rstrip()))
    total = 0.0
    for place in range(len(ids) - count, len(ids)):
        with torch.no_grad():
            total += float(model.logits(torch.tensor([ids[:place]]))[0, -1].double().log_softmax(-1)[ids[place]])
    return total


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_multiple_choice_against_sums_by_hand(vocabulary: Vocabulary, batch: int) -> None:
    model = small_model(vocab_size=288)
    score = score_choices(model, vocabulary, QUESTIONS, alone(), batch=batch)
    texts = [["the other thing", "the other stop the stop", "the other e"],
             ["then: é", "then: the other thing then the stop"], [" then", " é"]]  # fmt: skip
    expected = [
        [by_hand(model, vocabulary, text, choice) for text, choice in zip(of, question.choices, strict=True)]
        for of, question in zip(texts, QUESTIONS, strict=True)
    ]
    for found, wanted in zip(score.log_likelihoods, expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)
    best = [max(range(len(one)), key=one.__getitem__) for one in expected]
    assert score.accuracy == sum(b == q.answer for b, q in zip(best, QUESTIONS, strict=True)) / 3
    a_byte = [
        max(range(len(one)), key=lambda i: one[i] / len(q.choices[i].encode()))
        for one, q in zip(expected, QUESTIONS, strict=True)
    ]
    assert a_byte != best, "the question tells both rules apart"
    assert score.normalised == sum(b == q.answer for b, q in zip(a_byte, QUESTIONS, strict=True)) / 3


def test_a_choice_is_what_stands_behind_the_question(vocabulary: Vocabulary) -> None:
    ids, count = choice_tokens(vocabulary, "the other", "thing")
    assert vocabulary.decode(ids) == "the other thing" and vocabulary.decode(ids[-count:]) == " thing"
    assert choice_tokens(vocabulary, "the other ", "thing") == (ids, count)
    assert ids[0] == vocabulary.end_of_text


def on_ranks(ep: int, path: Path) -> tuple[tuple, list[list[float]]]:
    mesh = build_mesh(1, 2, ep, timeout=TIMEOUT)

    def model(**changes: int) -> Transformer:
        return small_model(
            dispatcher=make_dispatcher("all_to_all", mesh, 4, max_tokens=1), ep_rank=mesh.ep_rank, **changes
        )

    choices = score_choices(model(vocab_size=288), Vocabulary(path, 300), QUESTIONS, mesh, batch=2)
    return scored(model(), mesh, batch=2), choices.log_likelihoods


def test_ranks_score_shares_of_the_same(vocabulary: Vocabulary, tmp_path: Path) -> None:
    """5 windows and 7 choices in batches of 2 over 2 ranks: one rank has nothing in the last."""
    vocabulary.tokenizer.save(str(tmp_path / "tokenizer.json"))
    expected = scored(small_model(), alone())
    choices = score_choices(small_model(vocab_size=288), vocabulary, QUESTIONS, alone(), batch=2).log_likelihoods
    for found, found_choices in run_ranks(on_ranks, 2, 2, tmp_path / "tokenizer.json"):
        assert found == pytest.approx(expected, rel=1e-5)
        for one, other in zip(found_choices, choices, strict=True):
            assert one == pytest.approx(other, rel=1e-5)


def test_fp8_scores_any_number_of_tokens() -> None:
    assert math.isfinite(scored(small_model(Precision.FP8), alone(), batch=1)[0])


@pytest.mark.parametrize("row, words", [
    ({"question": "q", "choices": ["a"], "answer": 0}, r"^question 1 of F has 1 choices and the answer 0: give"),
    ({"question": "q", "choices": ["a", "b"], "answer": 2}, r"^question 1 of F has 2 choices and the answer 2"),
    ({"question": "q", "choices": ["a", "b"], "answer": "c"}, r"the answer 'c': "),
])  # fmt: skip
def test_bad_questions_are_one_sentence(row: dict, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_questions("F", [row])
    good = [
        {"question": "q", "choices": ["a", 3], "answer": "3"},
        {"question": "q", "choices": ["a", "b"], "answer": 0},
    ]
    assert [one.answer for one in read_questions("F", good)] == [1, 0]


def test_what_is_too_short_or_too_long_is_one_sentence(vocabulary: Vocabulary) -> None:
    with pytest.raises(DataError, match=r"^a text of 1 tokens predicts nothing"):
        score_text(small_model(), TEXT[:1], WHOLE, alone(), seq_len=8, batch=1, document_mask=False, strings=None)
    long = [Question("q" * 70, ("a", "b"), 0)]
    with pytest.raises(DataError, match=r"^a question with its choice has 73 tokens, 2 of them the choice's, and the"):
        score_choices(small_model(vocab_size=288), vocabulary, long, alone(), batch=1)
