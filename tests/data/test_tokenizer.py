"""Byte-level BPE: lossless, the same wherever it is trained, never fooled by text that looks like a special token."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from fp8moe.data import tokenizer as module
from fp8moe.data.token_bytes import byte_of_character, token_byte_strings
from fp8moe.data.tokenizer import (
    SPECIAL_TOKENS,
    check_beside,
    check_size,
    encode_pieces,
    end_of_text_id,
    file_hash,
    load_tokenizer,
    num_ids,
    save_tokenizer,
    tokenizer_beside,
    train_tokenizer,
)
from fp8moe.errors import ConfigError, DataError

TEXTS = [
    "def f(x):\n    return x  +  1\n\n\n\tprint('ümlaut', \"漢字\", '🙂')\r\n",
    "".join(map(chr, range(0x250))) + "\x00\x7f\u2028 end",
    "a <|endoftext|> b <|fim_prefix|><|fim_middle|>",
    " ",
]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer([Path(os.__file__).read_text(), *TEXTS], 600)


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    ((ids, _),) = encode_pieces(tokenizer, [(text, False)], 0)
    return ids.tolist()


@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(trained: Tokenizer, text: str) -> None:
    strings = token_byte_strings(trained)
    ids = ids_of(trained, text)
    assert b"".join(strings[i] for i in ids) == text.encode()
    assert not {trained.token_to_id(token) for token in SPECIAL_TOKENS} & set(ids)


def test_the_vocabulary(trained: Tokenizer) -> None:
    strings = token_byte_strings(trained)
    assert num_ids(trained) == len(strings) == trained.get_vocab_size() == 600
    assert [trained.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3]
    assert strings[:4] == [b""] * 4 and all(strings[4:])
    assert {bytes([byte]) for byte in range(256)} <= set(strings)
    assert len(set(strings[4:])) == 596
    assert end_of_text_id(trained) == 0 and end_of_text_id(trained, "<|fim_suffix|>") == 2


def test_training_is_the_same_in_another_process_with_other_threads(tmp_path: Path) -> None:
    program = (
        "import os, hashlib; from fp8moe.data.tokenizer import train_tokenizer\n"
        "texts = open(os.__file__).read().splitlines(keepends=True)\n"
        "print(hashlib.sha256(train_tokenizer(texts, 700).to_str().encode()).hexdigest())"
    )
    texts = Path(os.__file__).read_text().splitlines(keepends=True)
    here = hashlib.sha256(train_tokenizer(texts, 700).to_str().encode()).hexdigest()
    for threads in ("1", "3"):
        environment = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=True
        )
        assert done.stdout.strip() == here


def test_documents_end_where_they_end(trained: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BATCH_CHARS", 40)
    pieces = [("first line\n", False), ("second\n", True), ("other", True), ("x" * 100, False), ("y", True)] * 3
    out = list(encode_pieces(trained, pieces, 0))
    assert [ends for _, ends in out] == [ends for _, ends in pieces]
    strings = token_byte_strings(trained)
    for (ids, ends), (text, _) in zip(out, pieces, strict=True):
        assert ids.dtype == np.int64 and (ids[-1] == 0) == ends
        assert b"".join(strings[i] for i in ids) == text.encode()


def test_text_is_encoded_in_batches(trained: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BATCH_CHARS", 10)
    sizes = []
    monkeypatch.setattr(
        module, "_encode_batch", lambda _, batch, end: sizes.append([len(text) for text, _ in batch]) or []
    )
    lengths = [5, 4, 3, 10, 1, 9, 11, 9, 0]
    list(encode_pieces(trained, [("x" * length, True) for length in lengths], 0))
    assert sizes == [[5, 4, 3], [10], [1, 9], [11], [9, 0]]  # each ends with the piece that brings it to 10


def test_a_tokenizer_that_cannot_be_saved_leaves_nothing(trained: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "t.json").mkdir()
    with pytest.raises(OSError):
        save_tokenizer(trained, tmp_path / "t.json")
    assert [path.name for path in tmp_path.iterdir()] == ["t.json"]


def test_a_vocabulary_must_hold_every_id(trained: Tokenizer) -> None:
    check_size(trained, 600)
    with pytest.raises(
        ConfigError,
        match=r"ids up to 599 and data.vocab_size, .*, is 599: use model.vocab_size=640",
    ):
        check_size(trained, 599)


def test_the_tokenizer_beside_token_files(trained: Tokenizer, tmp_path: Path) -> None:
    prefixes = [str(tmp_path / name) for name in "abc"]
    assert tokenizer_beside(prefixes) is None
    for name in "bc":
        save_tokenizer(trained, tmp_path / f"{name}.tokenizer.json")
    assert tokenizer_beside(prefixes) == tmp_path / "b.tokenizer.json"
    assert file_hash(tmp_path / "b.tokenizer.json") == hashlib.sha256(trained.to_str(pretty=True).encode()).hexdigest()
    save_tokenizer(train_tokenizer(["x"], 260), tmp_path / "c.tokenizer.json")
    with pytest.raises(DataError, match=r"b.tokenizer.json and .*c.tokenizer.json differ"):
        tokenizer_beside(prefixes)
    with pytest.raises(DataError, match=r"a.tokenizer.json does not exist"):
        file_hash(tmp_path / "a.tokenizer.json")


def test_token_files_of_another_tokenizer_are_refused_and_renamed_special_tokens_are_not(tmp_path: Path) -> None:
    ours, theirs = train_tokenizer(["aaab bbba " * 9], 270), train_tokenizer(["xyxy yyxx " * 9], 266)
    given, prefix = tmp_path / "given.json", str(tmp_path / "a")
    save_tokenizer(ours, given)
    check_beside(given, [prefix])  # nothing lies beside it
    given_text = given.read_text()
    Path(f"{prefix}.tokenizer.json").write_text(given_text.replace("<|endoftext|>", "<|stop|>"))
    check_beside(given, [prefix])
    save_tokenizer(theirs, f"{prefix}.tokenizer.json")
    apart = sum(ours.id_to_token(id) != theirs.id_to_token(id) for id in range(260, theirs.get_vocab_size()))
    shared = theirs.get_vocab_size() - 4  # without the special tokens
    with pytest.raises(
        DataError, match=rf"a.bin was encoded with .*, of whose {shared} ids {apart} name other text in"
    ):
        check_beside(given, [prefix])


def test_a_saved_tokenizer_is_the_same(trained: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(trained, tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    assert token_byte_strings(loaded) == token_byte_strings(trained)
    assert all(ids_of(loaded, text) == ids_of(trained, text) for text in TEXTS)


def test_a_post_processor_adds_no_token() -> None:
    tokenizer = train_tokenizer(["some text"], 260)
    tokenizer.post_processor = processors.TemplateProcessing("<|fim_prefix|> $A", None, [("<|fim_prefix|>", 1)])
    assert tokenizer.encode("text").ids[0] == 1 and 1 not in ids_of(tokenizer, "text")


def test_added_tokens_are_text_unless_special() -> None:
    tokenizer = train_tokenizer(["some text"], 260)
    tokenizer.add_tokens(["écu"])
    tokenizer.add_special_tokens([AddedToken("<|pad|>", special=True)])
    assert token_byte_strings(tokenizer)[-2:] == ["écu".encode(), b""]
    ids = ids_of(tokenizer, "un écu <|pad|>")
    strings = token_byte_strings(tokenizer)
    assert b"".join(strings[i] for i in ids) == "un écu <|pad|>".encode()


def test_bad_tokenizers_are_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(DataError, match="does not exist"):
        load_tokenizer(path)
    path.write_text("{")
    with pytest.raises(DataError, match=r"not a tokenizer.json that"):
        load_tokenizer(path)
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.save(str(path))
    with pytest.raises(DataError, match="not a byte-level tokenizer"):
        load_tokenizer(path)
    pieces = Tokenizer(models.BPE({"▁a": 0}, []))
    pieces.decoder = decoders.Metaspace()
    pieces.save(str(path))
    with pytest.raises(DataError, match="not a byte-level tokenizer"):
        load_tokenizer(path)
    pieces.decoder = decoders.Sequence([decoders.Fuse(), decoders.ByteLevel()])
    pieces.save(str(path))
    with pytest.raises(DataError, match="token 0 of the tokenizer, '▁a'"):
        token_byte_strings(load_tokenizer(path))


def test_each_byte_has_one_character() -> None:
    mapping = byte_of_character()
    assert set(mapping) == set(pre_tokenizers.ByteLevel.alphabet()) and sorted(mapping.values()) == list(range(256))
    assert (mapping["!"], mapping["Ġ"], mapping["Ċ"], mapping["ÿ"], mapping["Ń"]) == (0x21, 0x20, 0x0A, 0xFF, 0xAD)


def test_unused_ids_stand_for_nothing() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: 2 * i for i, character in enumerate(alphabet)}, []))
    strings = token_byte_strings(tokenizer)
    assert num_ids(tokenizer) == len(strings) == 511 and strings[1::2] == [b""] * 255
    assert sorted(strings[::2]) == [bytes([byte]) for byte in range(256)]


def test_end_of_text_by_other_names() -> None:
    tokenizer = train_tokenizer(["x"], 260)
    raw = json.loads(tokenizer.to_str().replace("<|endoftext|>", "<｜end▁of▁sentence｜>"))
    assert end_of_text_id(Tokenizer.from_str(json.dumps(raw))) == 0
    raw = json.loads(tokenizer.to_str().replace("<|endoftext|>", "<|my_end|>"))
    with pytest.raises(DataError, match="no end-of-text token by any of the names"):
        end_of_text_id(Tokenizer.from_str(json.dumps(raw)))
    with pytest.raises(DataError, match="'<nope>'"):
        end_of_text_id(tokenizer, "<nope>")


def test_a_vocabulary_without_room_for_bytes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"vocab_size=259 .* use 260"):
        train_tokenizer(["text"], 259)
    assert train_tokenizer(["text"], 260).get_vocab_size() == 260
    assert train_tokenizer(["abab"], 5000).get_vocab_size() < 5000
