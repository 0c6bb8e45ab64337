"""How well a model predicts text: nats of every token, bits per byte and perplexity, log-likelihoods of choices.

A stream of tokens is cut into windows of seq_len tokens that predict the one after each; windows overlap by one, so
every token but the first is predicted once. In front of a text stands the end-of-text token where the vocabulary has
one, as between documents in training, so that a text's first token is predicted too. The last window is filled up with
tokens that predict nothing and that nothing before them sees.

A choice's log-likelihood is the sum over its tokens, given the question. Question and choice are encoded together, and
tokens behind those of the question alone are the choice's (as lm-evaluation-harness has it, where accuracy is `acc`,
and by bytes of the choice `acc_norm`).

On several ranks every rank scores an equal share: all make the same number of forwards, empty ones to keep step.

Legend: B sequences, S tokens of each, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fp8moe.data.packing import IGNORED_LABEL, Batch, Window, collate
from fp8moe.errors import DataError
from fp8moe.generate.text import Vocabulary
from fp8moe.kernels.cross_entropy import cross_entropy
from fp8moe.model.head_loss import chunk_tokens
from fp8moe.model.transformer import Transformer
from fp8moe.parallel.collectives import all_reduce
from fp8moe.parallel.mesh import Mesh
from fp8moe.train.batch import to_device


@torch.no_grad()
def token_nats(model: Transformer, batch: Batch) -> Tensor:
    """Nats of each label [B, S], FP32 on the host; 0 where none is predicted. Collective over ranks with experts."""
    assert model.embedding is not None and model.norm is not None and model.head is not None
    batch = to_device(batch, model.embedding.weight.device)
    positions = model.positions(batch.positions_BS, batch.document_lengths)
    hidden_TD, _ = model.run_blocks(model.embedding(batch.inputs_BS.flatten()), positions)
    x_TD, labels_T = model.norm(hidden_TD).tensor, batch.labels_BS.flatten()
    nats_T = torch.empty(len(x_TD), dtype=torch.float32, device=x_TD.device)
    size = chunk_tokens(len(x_TD), model.head.weight.shape[0], x_TD.dtype, x_TD.device)
    for x_CD, labels_C, nats_C in zip(*(part.split(size) for part in (x_TD, labels_T, nats_T)), strict=True):
        cross_entropy(model.head.fprop(x_CD), labels_C, nats_C)
    return nats_T.view_as(batch.labels_BS).cpu()


@dataclass(frozen=True)
class TextScore:
    """nats, tokens, num_bytes: sums over predicted tokens; num_bytes is 0 where a token's bytes are not known."""

    nats: float
    tokens: int
    num_bytes: int

    @property
    def perplexity(self) -> float:
        """exp of the nats a token."""
        return math.exp(min(self.nats / self.tokens, 700.0))

    @property
    def bits_per_byte(self) -> float | None:
        """Bits a byte of the text; None without a tokenizer."""
        return self.nats / math.log(2) / self.num_bytes if self.num_bytes else None


def windows(tokens: NDArray[np.int64], starts: NDArray[np.int64], seq_len: int) -> list[Window]:
    """Windows that predict every token but the first. starts: where documents begin, ascending."""
    found = []
    for first in range(0, len(tokens) - 1, seq_len):
        inside = starts[(starts > first) & (starts < first + seq_len + 1)] - first
        found.append(Window(tokens[first : first + seq_len + 1], np.concatenate([[0], inside])))
    return found


def batches(all_windows: Sequence[Window], seq_len: int, size: int, mesh: Mesh, *, document_mask: bool) -> list[Batch]:
    """This rank's windows in batches of `size`, the same number on every rank: filled up with what predicts nothing."""
    empty = Window(np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64))
    mine = list(all_windows[mesh.dp_rank :: mesh.dp])
    share = -(-len(all_windows) // (mesh.dp * size)) * size
    mine += [empty] * (share - len(mine))
    return [_batch(mine[at : at + size], seq_len, document_mask) for at in range(0, share, size)]


def _batch(some: Sequence[Window], seq_len: int, document_mask: bool) -> Batch:
    filled = [Window(np.pad(one.tokens, (0, seq_len + 1 - len(one.tokens))), one.starts) for one in some]
    batch = collate(filled, document_mask=document_mask)
    lengths_B = torch.tensor([max(len(one.tokens) - 1, 0) for one in some])
    behind_BS = torch.arange(seq_len) >= lengths_B[:, None]
    return Batch(
        batch.inputs_BS,
        batch.labels_BS.masked_fill(behind_BS, IGNORED_LABEL),
        batch.positions_BS,
        batch.document_lengths,
    )


def score_text(
    model: Transformer,
    tokens: NDArray[np.int64],
    starts: NDArray[np.int64],
    mesh: Mesh,
    *,
    seq_len: int,
    batch: int,
    document_mask: bool,
    strings: Sequence[bytes] | None,
) -> TextScore:
    """The score of a stream of tokens, the same on every rank; strings: the bytes of each id. Collective.

    Raises DataError for fewer than 2 tokens.
    """
    if len(tokens) < 2:
        raise DataError(f"a text of {len(tokens)} tokens predicts nothing: give at least 2")
    sums = torch.zeros(3, dtype=torch.float64)
    lengths = None if strings is None else torch.tensor([*map(len, strings)])
    for one in batches(windows(tokens, starts, seq_len), seq_len, batch, mesh, document_mask=document_mask):
        predicted = one.labels_BS[one.labels_BS != IGNORED_LABEL]
        sums[0] += token_nats(model, one).double().sum()
        sums[1] += predicted.numel()
        sums[2] += 0 if lengths is None else lengths[predicted].sum()
    nats, count, num_bytes = all_reduce(sums, mesh.world_group).tolist()
    return TextScore(nats, int(count), int(num_bytes))


@dataclass(frozen=True)
class Question:
    """A question with its choices, of which number `answer` is right."""

    question: str
    choices: tuple[str, ...]
    answer: int


def read_questions(path: str, rows: Sequence[dict[str, Any]]) -> list[Question]:
    """Questions of JSON objects with question, choices and answer, a choice's number from 0 or its text."""
    found = []
    for number, row in enumerate(rows, start=1):
        choices, answer = tuple(map(str, row["choices"])), row["answer"]
        if isinstance(answer, str) and answer in choices:
            answer = choices.index(answer)
        if len(choices) < 2 or not isinstance(answer, int) or not 0 <= answer < len(choices):
            raise DataError(
                f"question {number} of {path} has {len(choices)} choices and the answer {answer!r}: give at least 2 "
                f"choices, and the answer as one of them or as its number, 0 to {max(len(choices) - 1, 1)}"
            )
        found.append(Question(row["question"], choices, answer))
    return found


def choice_tokens(vocabulary: Vocabulary, question: str, choice: str) -> tuple[list[int], int]:
    """(ids of question and choice together, how many of the last are the choice's); end-of-text stands in front."""
    context = question.rstrip()
    together = vocabulary.encode(f"{question}{'' if question != context else ' '}{choice}")
    before = min(len(vocabulary.encode(context)), len(together) - 1)
    front = [] if vocabulary.end_of_text is None else [vocabulary.end_of_text]
    return [*front, *together], len(together) - before


@dataclass(frozen=True)
class ChoiceScore:
    """accuracy: share of questions whose right choice is the likeliest; normalised: the likeliest a byte.
    log_likelihoods: in nats, of every choice of every question."""

    accuracy: float
    normalised: float
    log_likelihoods: list[list[float]]


def score_choices(
    model: Transformer, vocabulary: Vocabulary, questions: Sequence[Question], mesh: Mesh, *, batch: int
) -> ChoiceScore:
    """The model's choices, the same on every rank. Collective. Raises DataError for a question that is too long."""
    context = model.config.max_seq_len
    asked = [choice_tokens(vocabulary, one.question, choice) for one in questions for choice in one.choices]
    for ids, count in asked:
        if len(ids) > context + 1 or count >= len(ids):
            raise DataError(
                f"a question with its choice has {len(ids)} tokens, {count} of them the choice's, and the model's "
                f"context, model.max_seq_len, is {context}: use at most {context + 1}, at least one before the choice"
            )
    sums = torch.zeros(len(asked), dtype=torch.float64)
    order = sorted(range(len(asked)), key=lambda i: len(asked[i][0]))  # alike lengths together
    step = batch * mesh.dp
    for at in range(0, len(order), step):
        longest = max(len(asked[i][0]) for i in order[at : at + step]) - 1
        mine = order[at : at + step][mesh.dp_rank :: mesh.dp]
        rows = [Window(np.array(asked[i][0]), np.zeros(1, dtype=np.int64)) for i in mine]
        rows = rows or [Window(np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64))]
        nats_BS = token_nats(model, _batch(rows, longest, document_mask=False)).double()
        for i, nats_S in zip(mine, nats_BS, strict=False):
            ids, count = asked[i]
            sums[i] = -nats_S[len(ids) - 1 - count : len(ids) - 1].sum()
    return _judged(questions, all_reduce(sums, mesh.world_group).tolist())


def _judged(questions: Sequence[Question], sums: Sequence[float]) -> ChoiceScore:
    right, right_a_byte, found, at = 0, 0, [], 0
    for one in questions:
        scores = list(sums[at : at + len(one.choices)])
        at += len(scores)
        found.append(scores)
        a_byte = [score / max(len(c.encode()), 1) for score, c in zip(scores, one.choices, strict=True)]
        right += max(range(len(scores)), key=scores.__getitem__) == one.answer
        right_a_byte += max(range(len(scores)), key=a_byte.__getitem__) == one.answer
    return ChoiceScore(right / len(questions), right_a_byte / len(questions), found)
