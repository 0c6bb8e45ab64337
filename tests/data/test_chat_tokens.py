"""Conversations as token files: the mask of every token, what is left out, packing, epochs, validation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from fp8moe.data.build import Data, open_data
from fp8moe.data.chat_template import BUILT_IN, ChatTemplate
from fp8moe.data.chat_tokens import (
    ChatTokens,
    described,
    encode_asked,
    encode_conversation,
    end_of_turn,
    open_chat_tokens,
)
from fp8moe.data.check import check_files
from fp8moe.data.packing import IGNORED_LABEL, PackedDataset, Window, collate
from fp8moe.data.sources import DataConfig
from fp8moe.errors import ConfigError, DataError
from tests.data.chats import ADDED, CHATML, DEEPSEEK, LLAMA, NAMES, TURNS, chat_tokenizer, exchange, write_rows

Open = Callable[..., ChatTokens]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return chat_tokenizer()


@pytest.fixture
def opened(tokenizer: Tokenizer, tmp_path: Path) -> Open:
    written: list[Any] = []

    def open_rows(rows: Sequence[Any], text: str = CHATML, seq_len: int = 400, *, drops: bool = False) -> ChatTokens:
        path = tmp_path / "chat.jsonl"
        if rows != written:
            write_rows(path, rows)
        written[:] = rows
        template = ChatTemplate(text, "the template", NAMES, ADDED)
        options: dict[str, Any] = dict(vocab_size=300, seq_len=seq_len, drops=drops, cache=tmp_path / "cache")
        return open_chat_tokens(path, template, tokenizer, **options)

    return open_rows


def spelled(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False))


@pytest.mark.parametrize("text, learned", [
    (CHATML, "c d<|im_end|>|Yes: c d\n<|im_end|>"),
    (LLAMA, "c d<|eot_id|>|Yes: c d<|eot_id|>"),
    (DEEPSEEK, "c d<｜end▁of▁sentence｜>|Yes: c d\n<｜end▁of▁sentence｜>"),
    (BUILT_IN["plain"], "c d<|eot_id|>|Yes: c d\n<|eot_id|>"),
])  # fmt: skip
def test_of_a_file_exactly_the_assistants_tokens_are_learned(
    opened: Open, tokenizer: Tokenizer, text: str, learned: str
) -> None:
    tokens = opened([{"messages": TURNS}], text)
    ids, mask = tokens.tokens, tokens.predicted
    assert mask is not None and len(mask) == len(ids)
    edges = np.flatnonzero(np.diff(mask, prepend=0, append=0))
    runs = [spelled(tokenizer, ids[a:b].tolist()) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    assert "|".join(runs) == learned
    template = ChatTemplate(text, "the template", NAMES, ADDED)
    assert spelled(tokenizer, ids.tolist()) == template.render(TURNS, asks=False)
    asked = encode_asked(template, tokenizer, TURNS[:4])
    assert asked == ids[: len(asked)].tolist() and mask[len(asked)] == 1 and mask[len(asked) - 1] == 0
    assert end_of_turn(template, tokenizer) == ids[np.flatnonzero(mask)[-1]]


def test_no_token_lies_across_the_border_of_an_answer(tokenizer: Tokenizer) -> None:
    glued = "{% for m in messages %}{{ m.content }}{% endfor %}"
    template = ChatTemplate(glued, "the template", {}, ADDED)
    turns = exchange("rig", "ht")["messages"]
    assert len(tokenizer.encode("right").ids) < len(tokenizer.encode("rig").ids) + len(tokenizer.encode("ht").ids)
    ids, mask = encode_conversation(template, tokenizer, turns)
    assert spelled(tokenizer, ids[mask == 0]) == "rig" and spelled(tokenizer, ids[mask == 1]) == "ht"
    assert end_of_turn(template, tokenizer) is None


def test_what_is_left_out_is_counted(opened: Open) -> None:
    rows = [
        exchange("a", "b"),
        {"messages": [{"role": "user", "content": "no answer"}]},
        exchange("a", "c" * 60),  # is cut
        exchange("a" * 60, "b"),  # has no answer within a sample
    ]
    cut = opened(rows, seq_len=40)
    assert (cut.counts.conversations, cut.counts.unanswered, cut.counts.too_long, cut.counts.truncated) == (4, 1, 1, 1)
    assert len(cut) == cut.counts.kept == 2 and np.diff(cut.document_offsets).max() == 41
    assert cut.predicted is not None and cut.counts.learned == int(cut.predicted.sum())
    assert cut.described().startswith(
        "chat.jsonl: 4 conversations, 1 without an answer left out, 1 too long left out, 1 "
    )
    dropped = opened(rows, seq_len=40, drops=True)
    assert (len(dropped), dropped.counts.too_long, dropped.counts.truncated) == (1, 2, 0)
    assert dropped.content() != cut.content() and dropped.fingerprint != cut.fingerprint


@pytest.mark.parametrize("rows, words", [
    ([{"messages": TURNS[:2]}], "has 1 conversations, 1 without an answer of the assistant and 0 longer than"),
    ([exchange("a" * 900, "b")], r"0 without .* and 1 longer than a sample of seq_len \+ 1 = 401 tokens, so there is"),
])  # fmt: skip
def test_a_file_of_which_nothing_is_learned_is_refused(opened: Open, rows: list[Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        opened(rows)


NOTHING = {
    "questions alone": "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
    "no messages": "Hello.",
    "empty": "",
    "empty marks": "{% for m in messages %}{{ m.content }}{% generation %}{% endgeneration %}{% endfor %}",
}


@pytest.mark.parametrize("text", NOTHING.values(), ids=NOTHING)
def test_a_template_that_writes_no_answer_is_named(opened: Open, tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        opened([exchange("a", "b"), {"messages": TURNS[:2]}, {"messages": TURNS}], text)
    assert str(caught.value) == (
        f"the template writes nothing of what the assistant says in {tmp_path / 'chat.jsonl'}, where 2 of 3 "
        "conversations have an answer: write message.content of the role assistant in data.chat_template"
    )


def test_a_template_that_fails_names_the_row(opened: Open) -> None:
    text = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    with pytest.raises(DataError, match=r"chat.jsonl line 2: the template refuses these messages \(no system role\)"):
        opened([exchange("a", "b"), {"messages": TURNS}], text)


def test_a_changed_file_is_read_again_and_an_equal_one_is_not(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, changed = opened([exchange("a", "b")]).content(), opened([exchange("a", "c")]).content()
    assert changed != first
    (tmp_path / "cache").rename(tmp_path / "moved")
    again = opened([exchange("a", "b")])
    assert again.content() == first, "wherever the files lie"
    monkeypatch.setattr("fp8moe.data.chat_tokens.read_conversations", None)  # not reached
    assert opened([exchange("a", "b")]).fingerprint == again.fingerprint


def test_a_damaged_mask_is_one_sentence(opened: Open) -> None:
    tokens = opened([exchange("a", "b")])
    Path(f"{tokens.bin_path}".removesuffix(".bin") + ".mask").write_bytes(b"\1")
    with pytest.raises(DataError, match=r"tokens.mask has not one byte a token: delete "):
        opened([exchange("a", "b")])


ROWS = [exchange(f"a {i}", "b " * (i % 7) + f"{i}") for i in range(40)]


def data_of(tmp_path: Path, rows: Sequence[Any] = ROWS, **changes: Any) -> Data:
    path = write_rows(tmp_path / "chat.jsonl", rows)
    chat_tokenizer().save(str(tmp_path / "tokenizer.json"))
    options: dict[str, Any] = dict(
        source="chat", paths=(str(path),), validation_share=0.1, tokenizer=str(tmp_path / "tokenizer.json"),
        chat_template="chatml", vocab_size=300, document_mask=True, packing="documents",
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    config = DataConfig(**(options | changes))
    check_files(config)
    return open_data(config, seq_len=64, seed=3)


def conversations(dataset: Any, epoch: int) -> list[tuple[int, ...]]:
    """The conversations of an epoch as their ids, from its samples; labels are those of the mask alone."""
    found = []
    for sample in range(epoch * len(dataset), (epoch + 1) * len(dataset)):
        window = dataset.window(sample)
        assert isinstance(window, Window) and window.predicted is not None
        ends = [*window.starts.tolist()[1:], len(window.tokens) - window.padding]
        batch = collate([window], document_mask=True)
        for start, end in zip(window.starts.tolist(), ends, strict=True):
            ids, learned = window.tokens[start:end], window.predicted[start:end]
            found.append(tuple(ids.tolist()))
            expected = np.where(learned[1:] == 1, ids[1:], IGNORED_LABEL)
            assert batch.labels_BS[0, start : end - 1].tolist() == expected.tolist()
        assert not window.predicted[len(window.tokens) - window.padding :].any()
        assert (batch.labels_BS != IGNORED_LABEL).sum() == window.predicted[1:].sum()
    return found


def test_every_epoch_has_every_whole_conversation_once_in_another_order(tmp_path: Path) -> None:
    data = data_of(tmp_path)
    assert isinstance(data.train, PackedDataset) and isinstance(data.validation, PackedDataset)
    assert data.chat is not None and data.bigram_bits_per_byte is None and data.token_bytes is not None
    first, second = (conversations(data.train, epoch) for epoch in (0, 1))
    held_out = conversations(data.validation, 0)
    template = data.chat
    encoded = [tuple(encode_conversation(template, chat_tokenizer(), row["messages"])[0].tolist()) for row in ROWS]
    assert sorted(first) == sorted(second) and first != second
    assert sorted(first + held_out) == sorted(encoded) and len(held_out) == 4
    again = data_of(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(*(
        (one.train.batch([5, 31]).labels_BS, one.train.batch([5, 31]).inputs_BS) for one in (data, again)
    ), strict=True))  # fmt: skip
    (line,) = described(data.train, data.validation)
    assert line.startswith("chat.jsonl: 40 conversations; ") and line.endswith("% of the tokens are learned")


def test_files_are_mixed_and_validation_may_have_its_own(tmp_path: Path) -> None:
    other = write_rows(tmp_path / "other.jsonl", [exchange("c", "d")] * 3)
    path = tmp_path / "chat.jsonl"
    data = data_of(tmp_path, paths=(str(path), str(other)), weights=(3, 1), validation_paths=(str(other),))
    *lines, last = described(data.train, data.validation)
    assert len(lines) == 2 and last.endswith(" held out as well, token for token: 3 of other.jsonl")
    held_out = {one for epoch in (0, 1) for one in conversations(data.validation, epoch)}
    assert len(held_out) == 1 and len(data.train) > len(data.validation)
    with pytest.raises(
        DataError, match=r"chat.jsonl has 1 document and holding one out needs 2: set data.validation_p"
    ):
        data_of(tmp_path, ROWS[:1])


@pytest.mark.parametrize("changes, kind, words", [
    (dict(paths=()), ConfigError, r"data.source=chat needs at least 1 entry in data.paths, got 0: give a .jsonl"),
    (dict(fim_rate=0.1), ConfigError, "data.fim_rate=0.1 would cut conversations of data.source=chat apart"),
    (dict(tokenizer=None), ConfigError, "data.source=chat needs a tokenizer and data.tokenizer is null: name"),
    (dict(chat_template=None), ConfigError, "has no chat template, .*: use data.chat_template=plain"),
    (dict(vocab_size=256), ConfigError, "the tokenizer has ids up to"),
    (dict(long_conversations="cut"), ValueError, "data.long_conversations='cut' does not exist: use truncate or drop"),
])  # fmt: skip
def test_settings_that_do_not_go_with_chat(changes: dict[str, Any], kind: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(kind, match=words):
        data_of(tmp_path, **changes)


def test_the_first_row_is_looked_at_before_a_run_starts(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 1 has no messages, it has text"):
        data_of(tmp_path, [{"text": "a"}])
    assert not (tmp_path / "cache").exists()


def test_a_stream_of_conversations_is_learned_where_the_assistant_speaks_too(tmp_path: Path) -> None:
    data = data_of(tmp_path, packing="stream", document_mask=False)
    template, tokenizer = data.chat, chat_tokenizer()
    assert template is not None and isinstance(data.train, PackedDataset)
    masks = {}
    for row in ROWS:
        ids, mask = encode_conversation(template, tokenizer, row["messages"])
        masks[tuple(ids.tolist())] = mask
    whole = {key: mask for key, mask in masks.items() if len(key) < 40}
    found = 0
    for sample in range(len(data.train)):
        window = data.train.window(sample)
        assert window.predicted is not None
        for start, end in zip(window.starts[:-1].tolist(), window.starts[1:].tolist(), strict=True):
            if (key := tuple(window.tokens[start:end].tolist())) in whole:
                assert window.predicted[start:end].tolist() == whole[key].tolist()
                found += 1
        if len(window.starts) > 1 and window.starts[1] > 1:  # the end of a conversation that a window before began
            tail = tuple(window.tokens[: window.starts[1]].tolist())
            ends = {tuple(mask[-len(tail) :].tolist()) for key, mask in masks.items() if key[-len(tail) :] == tail}
            assert tuple(window.predicted[: len(tail)].tolist()) in ends
    assert found > 10


def test_conversations_that_are_held_out_as_well_are_counted(tmp_path: Path) -> None:
    """By their tokens as they are trained on: cut alike, whatever else a row has; a prefix is another conversation."""
    held = [*ROWS[3:6], exchange("a" * 9, "b" * 90), exchange("a 7", "another answer")]
    more = [ROWS[4] | {"id": 7}, exchange("a" * 9, "b" * 90 + "c"), exchange("a", "b" * 9), ROWS[30]]
    valid, other = write_rows(tmp_path / "valid.jsonl", held), write_rows(tmp_path / "other.jsonl", more)
    files = str(tmp_path / "chat.jsonl"), str(other)
    data = data_of(tmp_path, paths=files, validation_paths=(str(valid),))
    assert described(data.train, data.validation)[2:] == [
        "conversations that are trained on and held out as well, token for token: 3 of chat.jsonl, 2 of other.jsonl"
    ]
    apart = write_rows(tmp_path / "valid.jsonl", held[4:] * 3)
    data = data_of(tmp_path, paths=files, validation_paths=(str(apart),))
    assert len(described(data.train, data.validation)) == 2
    twice = data_of(tmp_path, rows=[*ROWS, *ROWS[5:]])
    held_out = set(conversations(twice.validation, 0))
    count = sum(one in held_out for one in conversations(twice.train, 0))
    (_, line) = described(twice.train, twice.validation)
    assert count > 3 and line.endswith(f" token for token: {count} of chat.jsonl")
