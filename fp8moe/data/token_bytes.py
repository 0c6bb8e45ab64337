"""The bytes of tokens: which tokenizers can be counted in bytes, and the bytes of each of their ids.

Bits per byte are exact, and comparable between tokenizers, only where the tokens of a text, joined, are its bytes. Two
kinds of vocabulary have that:
- **byte-level** (GPT-2 and most since): every character of a token stands for one byte;
- **Metaspace with byte fallback** (Llama 2, Mistral, Gemma): `▁` stands for a space, `<0x0A>` for a byte, every other
  character for itself, and a character that no token has is written as its bytes.

The second kind puts a space in front of a text. That space is no byte of it, and an id has one number of bytes wherever
it stands, so it is left out when the tokenizer is loaded: the first word of a document has the id of a word within a
line without a space before it, all other ids are the released tokenizer's. Refused: counting that space, which is wrong
by one byte a document and one a piece of a long document; and kinds that lose text, whose bytes could only be
estimated: no byte fallback, or a normalizer that changes characters. A `▁` in a text itself comes back as a space.
"""

from __future__ import annotations

import json
import re
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

from fp8moe.errors import DataError

SPACE = "▁"
LONG_WORD = 4096
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
# At least LONG_WORD characters, to the end of a line or before a space that follows another character: no token of
# a vocabulary that was trained on words goes across either.
_CUT = re.compile(rf"(?s).{{{LONG_WORD},}}?(?:(?<=\n)|(?<=[^ \n])(?= ))|.+")


def is_byte_level(parts: dict[str, Any]) -> bool:
    """Whether a tokenizer's JSON decodes by ByteLevel."""
    return "ByteLevel" in _types(parts.get("decoder"), "decoders")


def has_byte_fallback(parts: dict[str, Any]) -> bool:
    """Whether a tokenizer's JSON decodes `<0x0A>` as a byte."""
    return "ByteFallback" in _types(parts.get("decoder"), "decoders")


def is_metaspace(parts: dict[str, Any]) -> bool:
    """Whether a tokenizer's JSON is of the second kind at the top of this module, so that its tokens keep all bytes."""
    model = parts.get("model") or {}
    vocab = model.get("vocab") or {}
    tokens = set(vocab) if isinstance(vocab, dict) else {entry[0] for entry in vocab}
    spaces = _spaces_become_marks(parts)
    decodes = has_byte_fallback(parts) and bool(model.get("byte_fallback"))
    return decodes and spaces and tokens.issuperset(_BYTE_TOKENS)


def _types(part: dict[str, Any] | None, inner: str) -> list[str]:
    return [str(one["type"]) for one in _flat(part, inner)]


def _flat(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """The parts of a Sequence, or the one part."""
    if part is None:
        return []
    if isinstance(part.get(inner), list):
        return [one for element in part[inner] for one in _flat(element, inner)]
    return [part]


def _spaces_become_marks(parts: dict[str, Any]) -> bool:
    """Whether spaces become SPACE and nothing else changes a character."""
    normalizers = _flat(parts.get("normalizer"), "normalizers")
    replaced = [one for one in normalizers if one["type"] == "Replace"]
    if any(one.get("pattern") != {"String": " "} or one.get("content") != SPACE for one in replaced):
        return False
    if any(one["type"] not in ("Replace", "Prepend") for one in normalizers):
        return False
    splits = _flat(parts.get("pre_tokenizer"), "pretokenizers")
    marks = [one for one in splits if one["type"] == "Metaspace" and one.get("replacement") == SPACE]
    return bool(replaced or marks)


def without_prefix(parts: dict[str, Any]) -> dict[str, Any]:
    """The JSON of a Metaspace tokenizer that puts no space in front of a text, nor takes one away again."""
    parts = dict(parts)
    parts["normalizer"] = _kept(parts.get("normalizer"), "normalizers", "Prepend")
    parts["decoder"] = _kept(parts.get("decoder"), "decoders", "Strip")
    for name, inner in (("pre_tokenizer", "pretokenizers"), ("decoder", "decoders")):
        for one in _flat(parts.get(name), inner):
            if one["type"] == "Metaspace":
                one["prepend_scheme"] = "never"
    return parts


def _kept(part: dict[str, Any] | None, inner: str, dropped: str) -> dict[str, Any] | None:
    kept = [one for one in _flat(part, inner) if one["type"] != dropped]
    if part is None or not kept:
        return None
    return {"type": "Sequence", inner: kept} if isinstance(part.get(inner), list) else part


def needs_cuts(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer takes a text as one word, in the length of which BPE's time grows faster than linearly."""
    return not isinstance(tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel | pre_tokenizers.Sequence)


def cut_words(text: str) -> list[str]:
    """The text in pieces of LONG_WORD characters and more, cut where no token goes across."""
    return _CUT.findall(text)


def byte_of_character() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (source: GPT-2's released encoder).

    Printable Latin-1 characters stand for themselves; the other 68 bytes are written as the characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    mapping = {chr(byte): byte for byte in printable}
    mapping.update({chr(0x100 + i): byte for i, byte in enumerate(hidden)})
    return mapping


def token_byte_strings(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes of each id, by id; empty for special tokens and unused ids. Raises DataError."""
    decoder = tokenizer.decoder
    fallback = decoder is not None and has_byte_fallback({"decoder": json.loads(decoder.__getstate__())})
    byte_of = byte_of_character()
    added = tokenizer.get_added_tokens_decoder()
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    strings = [b""] * (max(vocab.values()) + 1)
    for token, token_id in vocab.items():
        if token_id in added:
            strings[token_id] = b"" if added[token_id].special else token.encode()
        elif fallback:
            found = _BYTE.fullmatch(token)
            strings[token_id] = bytes([int(found[1], 16)]) if found else token.replace(SPACE, " ").encode()
        else:
            try:
                strings[token_id] = bytes(byte_of[character] for character in token)
            except KeyError:
                raise DataError(
                    f"token {token_id} of the tokenizer, {token!r}, has characters that stand for no byte: "
                    "use a byte-level BPE"
                ) from None
    return strings
