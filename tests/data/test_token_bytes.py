"""Tokenizers whose tokens are bytes: Llama 2's kind against the tokenizers and transformers libraries."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from fp8moe.cli import tokenize
from fp8moe.data import readers
from fp8moe.data import token_bytes as module
from fp8moe.data.indexed import IndexedDataset
from fp8moe.data.token_bytes import token_byte_strings
from fp8moe.data.tokenizer import encode_pieces, end_of_text_id, load_tokenizer, num_ids
from fp8moe.errors import DataError

SPECIAL = ["<unk>", "<s>", "</s>"]
TEXTS = [
    "A line of words.\nAnother  one,\twith  spaces \n",
    "  two in front; ümlaut 漢字 🙂 <0x41> </s> end",
    "a" * 50 + "\x00\r\n\n\n",
    " ",
    "word",
]


def metaspace(path: Path, style: str) -> Path:
    """A BPE with byte fallback, trained here: style `prepend` as in Llama 2's file, `metaspace` as newer ones."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("▁+[^▁]*|[^▁]+"), "isolated")  # runs of spaces are tokens
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL + byte_tokens, show_progress=False)
    tokenizer.train_from_iterator(["▁A line of words, another one with    spaces and  words of a line " * 9], trainer)
    parts = json.loads(tokenizer.to_str())
    parts["added_tokens"] = [one for one in parts["added_tokens"] if one["content"] in SPECIAL]
    tokenizer = Tokenizer.from_str(json.dumps(parts))
    tokenizer.normalizer = None
    if style == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = None
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.save(str(path))
    return path


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    ((ids, _),) = encode_pieces(tokenizer, [(text, False)], 0)
    return ids.tolist()


@pytest.mark.parametrize("style", ["prepend", "metaspace"])
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(tmp_path: Path, style: str) -> None:
    tokenizer = load_tokenizer(metaspace(tmp_path / "t.json", style))
    strings = token_byte_strings(tokenizer)
    assert len(strings) == num_ids(tokenizer) and end_of_text_id(tokenizer) == 2
    assert strings[:3] == [b""] * 3 and strings[3 : 3 + 256] == [bytes([byte]) for byte in range(256)]
    for text in TEXTS:
        ids = ids_of(tokenizer, text)
        assert b"".join(strings[one] for one in ids) == text.encode()
        assert not {0, 1, 2} & set(ids) and tokenizer.decode(ids, skip_special_tokens=False) == text
    again = Tokenizer.from_str(tokenizer.to_str())  # what is kept beside the token files
    again.save(str(tmp_path / "again.json"))
    assert ids_of(load_tokenizer(tmp_path / "again.json"), TEXTS[0]) == ids_of(tokenizer, TEXTS[0])


@pytest.mark.parametrize("style", ["prepend", "metaspace"])
def test_token_files_have_the_bytes_of_their_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, style: str) -> None:
    """Documents in many pieces as well: no space is counted at their beginnings."""
    monkeypatch.setattr(readers, "PIECE_CHARS", 40)
    text = "A line of words, an ümlaut and 漢字\n" * 30
    (tmp_path / "in.txt").write_text(text)
    given = str(metaspace(tmp_path / "t.json", style))
    command = ["--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "x"), "--tokenizer", given]
    assert tokenize.main(command) == 0
    source = IndexedDataset(tmp_path / "x")
    tokenizer = load_tokenizer(tmp_path / "x.tokenizer.json")
    sizes = np.array([len(string) for string in token_byte_strings(tokenizer)])
    assert int(sizes[source.tokens].sum()) == len(text.encode()) and int(source.tokens[-1]) == 2
    assert tokenizer.decode(source.tokens[:-1].tolist()) == text


@pytest.mark.parametrize("style", ["prepend", "metaspace"])
def test_ids_are_those_of_transformers_but_for_the_space_in_front(tmp_path: Path, style: str) -> None:
    transformers = pytest.importorskip("transformers")
    given = metaspace(tmp_path / "t.json", style)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(given))
    tokenizer, strings = load_tokenizer(given), token_byte_strings(load_tokenizer(given))
    for text in ("word and a line of words", "one ümlaut 漢字 🙂\nwith spaces"):
        with_space, without = theirs(text)["input_ids"], ids_of(tokenizer, text)
        assert b"".join(strings[one] for one in with_space) == b" " + text.encode(), "theirs counts a byte too many"
        assert ids_of(tokenizer, f" {text}") == with_space, "a space of the text itself is the same token"
        tail = len(tokenizer.encode(text.partition(" ")[0]).ids)
        assert without[tail:] == with_space[-len(without[tail:]) :]


def test_a_long_text_is_cut_where_no_token_goes_across(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(metaspace(tmp_path / "t.json", "prepend"))
    text = "".join(f"words of  a line {i}\n" if i % 3 else f"another {i}   " for i in range(200)) + "x" * 99 + " " * 40
    whole = tokenizer.encode(text, add_special_tokens=False).ids
    for length in (1, 7, 50):
        monkeypatch.setattr(
            module, "_CUT", module.re.compile(module._CUT.pattern.replace(str(module.LONG_WORD), str(length)))
        )
        pieces = module.cut_words(text)
        assert "".join(pieces) == text and len(pieces) > len(text) / (length + 100)
        assert ids_of(tokenizer, text) == whole
    assert module.cut_words("") == [] and any(string == b"  " for string in token_byte_strings(tokenizer))


def test_byte_level_text_is_not_cut() -> None:
    tokenizer = Tokenizer(models.BPE())
    for kind in (pre_tokenizers.ByteLevel(), pre_tokenizers.Sequence([pre_tokenizers.ByteLevel()])):
        tokenizer.pre_tokenizer = kind
        assert not module.needs_cuts(tokenizer)


@pytest.mark.parametrize("change", ["no fallback", "a byte is missing", "a normalizer", "no spaces", "another decoder"])
def test_kinds_that_lose_bytes_are_refused(tmp_path: Path, change: str) -> None:
    parts = json.loads(metaspace(tmp_path / "t.json", "prepend").read_text())
    if change == "no fallback":
        parts["model"]["byte_fallback"] = False
    elif change == "a byte is missing":
        parts["model"]["vocab"]["<0xzz>"] = parts["model"]["vocab"].pop("<0x7F>")
    elif change == "a normalizer":
        parts["normalizer"]["normalizers"].append({"type": "NFKC"})
    elif change == "no spaces":
        parts["normalizer"] = None
    else:
        parts["decoder"] = {"type": "Fuse"}
    (tmp_path / "t.json").write_text(json.dumps(parts))
    with pytest.raises(DataError, match=r"not a byte-level tokenizer .* nor one of ▁ with byte fallback"):
        load_tokenizer(tmp_path / "t.json")
