"""Text in and out: characters of several tokens, stop strings across tokens, prompts, chats."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fp8moe.data.tokenizer import train_tokenizer
from fp8moe.errors import ConfigError, DataError
from fp8moe.generate.text import (
    TextStream,
    Vocabulary,
    check_stops,
    json_lines,
    read_chat,
    read_prompts,
)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(["the other thing", "then the stop"] * 9, 280).save(str(path))
    return Vocabulary(path, 300)


def streamed(vocabulary: Vocabulary, text: str, *stops: str, bytes_alone: bool = True) -> tuple[list[str], str, bool]:
    """(pieces given out, whole text, whether a stop ended it) of the text's bytes, a token each."""
    ids = [vocabulary.strings.index(bytes([b])) for b in text.encode()] if bytes_alone else vocabulary.encode(text)
    stream, pieces = TextStream(vocabulary, vocabulary.ends, stops), []
    for one in ids:
        piece, is_over = stream.add(one)
        pieces.append(piece)
        if is_over:
            return pieces, stream.text, True
    pieces.append(stream.close())
    assert "".join(pieces) == stream.text
    return pieces, stream.text, False


def test_characters_come_when_they_are_whole(vocabulary: Vocabulary) -> None:
    pieces, text, _ = streamed(vocabulary, "aé€😀z")
    assert text == "aé€😀z" and pieces == ["a", "", "é", "", "", "€", "", "", "", "😀", "z", ""]
    stream = TextStream(vocabulary, vocabulary.ends, ())
    stream.add(vocabulary.strings.index(b"\xe2"))
    assert stream.close() == "�"


@pytest.mark.parametrize("text, stops, expected", [
    ("one stop two", ("stop",), "one "),
    ("one sto two", ("stop",), "one sto two"),
    ("ststop", ("stop",), "st"),
    ("a\n\nb", ("\n\n",), "a"),
    ("xabcdy", ("bcd", "abc"), "x"),
    ("xabd", ("abc", "b"), "xa"),
    ("aab", ("aaab", "ab"), "a"),
    ("no end sto", ("stop",), "no end sto"),
])  # fmt: skip
def test_stop_strings_end_a_text_before_them(
    vocabulary: Vocabulary, text: str, stops: tuple[str, ...], expected: str
) -> None:
    for bytes_alone in (True, False):
        pieces, found, is_over = streamed(vocabulary, text, *stops, bytes_alone=bytes_alone)
        assert found == expected == "".join(pieces)
        assert is_over == any(stop in text for stop in stops)


def test_what_may_be_a_stop_string_is_held_back(vocabulary: Vocabulary) -> None:
    assert streamed(vocabulary, "ab##x", "###")[0] == ["a", "b", "", "", "##x", ""]


def test_the_end_of_text_ends_and_is_no_text(vocabulary: Vocabulary) -> None:
    assert vocabulary.end_of_text is not None
    stream = TextStream(vocabulary, vocabulary.ends, ("stop",))
    stream.add(vocabulary.strings.index(b"s"))
    assert stream.add(vocabulary.end_of_text) == ("s", True)
    ignoring = TextStream(vocabulary, frozenset(), ())
    assert ignoring.add(vocabulary.end_of_text) == ("", False)


def test_special_tokens_are_text_in_prompts_and_tokens_in_chats(vocabulary: Vocabulary) -> None:
    assert vocabulary.end_of_text not in vocabulary.encode("a<|endoftext|>")
    assert vocabulary.encode("a<|endoftext|>", special=True)[-1] == vocabulary.end_of_text
    assert vocabulary.decode(vocabulary.encode("a<|endoftext|>é")) == "a<|endoftext|>é"
    assert vocabulary.token("<|endoftext|>") == vocabulary.end_of_text
    with pytest.raises(ConfigError, match=r"^--stop-token='<\|im_end\|>' is no token of the tokenizer, whose special"):
        vocabulary.token("<|im_end|>")


def test_bad_tokenizers_and_stops_are_one_sentence(vocabulary: Vocabulary, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"there is no tokenizer at .*none.json: name a tokenizer.json with --tokenizer"
    ):
        Vocabulary(tmp_path / "none.json", 300)
    vocabulary.tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(
        DataError, match=r"has ids up to \d+ and the model's vocabulary, model\.vocab_size, is 256: use"
    ):
        Vocabulary(tmp_path / "tokenizer.json", 256)
    with pytest.raises(ConfigError, match=r"^--stop='' has no characters"):
        check_stops(["a", ""])


def test_prompts_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.jsonl").write_text('{"prompt": "one"}\n\n{"prompt": "two", "more": 1}\n')
    assert read_prompts(str(tmp_path / "a.txt")) == ["one\ntwo\n"]
    assert read_prompts(str(tmp_path / "b.jsonl")) == ["one", "two"]
    with pytest.raises(DataError, match="can't be read"):
        read_prompts(str(tmp_path / "none"))


@pytest.mark.parametrize("text, words", [
    ('{"prompt": "a"}\n{"question": "b"}', r"^line 2 of F needs the keys prompt, prompt being text, and has question"),
    ("[1]", r"^line 1 of F needs the keys prompt, prompt being text, and is no object: "),
    ('{"prompt": 3}', r"^line 1 of F needs the keys prompt, prompt being text, and has prompt: "),
    ("no json", r"^line 1 of F is not JSON \(.*\): write one object a line$"),
    ("\n\n", r"^F has 0 lines and needs at least 1: "),
])  # fmt: skip
def test_bad_json_lines_are_one_sentence(text: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        json_lines("F", text, {"prompt": str})


def test_chats_of_files(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hé\n"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "chat.json").write_text(json.dumps(messages))
    assert read_chat(str(tmp_path / "chat.json")) == messages


def test_bad_chats_are_one_sentence(tmp_path: Path) -> None:
    for text in ("{}", "[]", '[{"role": "user"}]'):
        (tmp_path / "chat.json").write_text(text)
        with pytest.raises(DataError, match="must hold a list of at least 1 message"):
            read_chat(str(tmp_path / "chat.json"))
    message = b'{"role": "user", "content": "a"}'
    for content, says in (
        (b"[" + message + b"]\n[" + message + b"]", "another JSON document begins in line 2, and a chat is one): name"),
        (b"\n", "it is empty): name"),
        (b'[{"role": "user",\n "content": "a]', "it is not JSON, line 2, column 13): name"),
        (b"\xff", "it is not UTF-8): name"),
        (b"[" * 99999, "it is not JSON): name"),
        (b"[" + message + b', {"role": "user", "content": null}]', "must have text as its role and its content"),
    ):
        (tmp_path / "chat.json").write_bytes(content)
        with pytest.raises(DataError, match=re.escape(says)):
            read_chat(str(tmp_path / "chat.json"))
