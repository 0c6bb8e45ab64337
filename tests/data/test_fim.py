"""Fill-in-the-middle: text and order of a document's parts, its share, what it depends on, and what it may not lose."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers

from fp8moe.data.build import open_data
from fp8moe.data.fim import FillInTheMiddle, open_fim, sentinel_ids
from fp8moe.data.indexed import IndexedDataset, IndexedWriter
from fp8moe.data.packing import PackedDataset, every_document
from fp8moe.data.sources import DataConfig
from fp8moe.data.token_bytes import token_byte_strings
from fp8moe.data.tokenizer import save_tokenizer, train_tokenizer
from fp8moe.errors import ConfigError, DataError

WORDS = (
    *("def", "return", "import", "self.", "print(naïve)", "東京都", "für", "x", "+=", "1\n", "", "", "", "🙂🙂"),
    *("lambda:", "None,", "yield_from\t"),
)
BEGIN, HOLE, END, EOS = 1, 2, 3, 0


def texts(count: int) -> list[str]:
    random = np.random.RandomState(0)
    return [" ".join(WORDS[i] for i in random.randint(0, len(WORDS), random.randint(1, 60))) for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(texts(300), 420)


def encoded(tokenizer: Tokenizer, text: str) -> np.ndarray:
    return np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)


def fim(tokenizer: Tokenizer, rate: float = 1.0, seed: int = 7, end: int | None = EOS) -> FillInTheMiddle:
    return FillInTheMiddle(rate, tokenizer, token_byte_strings(tokenizer), (BEGIN, HOLE, END), end, seed)


def parts(ids: np.ndarray, strings: list[bytes]) -> tuple[bytes, bytes, bytes]:
    """(prefix, middle, suffix) of a document after FIM, from where the sentinels are."""
    ids = ids.tolist()
    assert ids[0] == BEGIN and ids.count(BEGIN) == ids.count(HOLE) == ids.count(END) == 1
    hole, end = ids.index(HOLE), ids.index(END)
    assert hole < end
    prefix, suffix, middle = ids[1:hole], ids[hole + 1 : end], ids[end + 1 :]
    return tuple(b"".join(strings[i] for i in part) for part in (prefix, middle, suffix))  # type: ignore[return-value]


def test_a_document_keeps_its_text_and_is_cut_between_characters(tokenizer: Tokenizer) -> None:
    strings, change, within = token_byte_strings(tokenizer), fim(tokenizer), 0
    for number, text in enumerate(texts(200)):
        ids = encoded(tokenizer, text)
        changed = change.apply(np.append(ids, EOS), number, 0)
        assert changed[-1] == EOS and changed.tolist().count(EOS) == 1
        prefix, middle, suffix = parts(changed[:-1], strings)
        assert (prefix + middle + suffix).decode() == text
        for part in (prefix, middle, suffix):
            part.decode()
        boundaries = {0, *np.cumsum([len(strings[i]) for i in ids]).tolist()}
        within += len(prefix) not in boundaries
        open_ended = change.apply(ids, number, 0)
        assert parts(open_ended, strings)[1] != b"" or len(open_ended) >= len(ids) + 3
        assert np.array_equal(open_ended, changed[:-1]), "the end of text plays no part"
    assert within > 60, "cuts are made within tokens"


def test_cuts_are_spread_evenly_over_characters(tokenizer: Tokenizer) -> None:
    strings, change = token_byte_strings(tokenizer), fim(tokenizer)
    ids, counts = encoded(tokenizer, "é" * 9), np.zeros((10, 10), dtype=int)
    for number in range(2000):
        prefix, middle, _ = parts(change.apply(ids, number, 0), strings)
        counts[len(prefix) // 2, (len(prefix) + len(middle)) // 2] += 1
    expected = 2000 * (2 - np.eye(10)) / 100  # of two even draws, in order
    upper = np.triu_indices(10)
    assert not np.tril(counts, -1).any()
    chi2 = ((counts - expected)[upper] ** 2 / expected[upper]).sum()
    assert chi2 < 54 + 5 * math.sqrt(2 * 54)


@settings(deadline=None, max_examples=80)
@given(text=st.text(max_size=60), data=st.data())
def test_any_text_is_split_at_any_character(text: str, data: st.DataObject) -> None:
    tokenizer = _tokenizer()
    strings, ids = token_byte_strings(tokenizer), encoded(tokenizer, text)
    at = data.draw(st.integers(0, len(text)))
    left, right = fim(tokenizer).split(ids, at)
    found = [b"".join(strings[i] for i in part) for part in (left, right)]
    assert found == [text[:at].encode(), text[at:].encode()]


def _tokenizer(made: list[Tokenizer] = []) -> Tokenizer:  # noqa: B006
    if not made:
        made.append(train_tokenizer(texts(300), 420))
    return made[0]


def test_a_long_document_costs_what_a_short_one_does_and_is_encoded_as_the_whole_parts(tokenizer: Tokenizer) -> None:
    text = " ".join(texts(200))
    ids, change, same, seen = encoded(tokenizer, text), fim(tokenizer), 0, []
    encode = change._encode
    change._encode = lambda part: seen.append(len(part)) or encode(part)  # type: ignore[method-assign, func-returns-value]
    for at in range(1, len(text), 997):
        left, right = change.split(ids, at)
        same += np.array_equal(left, encoded(tokenizer, text[:at])) and np.array_equal(
            right, encoded(tokenizer, text[at:])
        )
    tried = len(range(1, len(text), 997))
    assert max(seen) < 1000 < len(text) and same / tried > 0.95


def test_text_that_does_not_come_back_is_cut_between_tokens() -> None:
    upper = train_tokenizer(texts(300), 420)
    upper.normalizer = normalizers.Lowercase()
    strings, plain = token_byte_strings(upper), _tokenizer()
    ids = encoded(plain, "XYZ abc " * 4)
    broken = np.array([strings.index(bytes([b])) for b in b"ab\xff\xfecd\x80ef"])
    for change, document in ((fim(upper), ids), (fim(plain), broken)):
        whole = b"".join(strings[i] for i in document)
        for number in range(40):
            assert b"".join(parts(change.apply(document, number, 0), strings)) == whole


def test_special_tokens_within_a_document_stay(tokenizer: Tokenizer) -> None:
    document = np.concatenate([encoded(tokenizer, "alpha beta"), [EOS], encoded(tokenizer, "gamma"), [EOS]])
    for number in range(40):
        changed = fim(tokenizer).apply(document, number, 0).tolist()
        assert changed.count(EOS) == 2 and changed[-1] == EOS


@pytest.mark.parametrize("document", [[], [EOS], [EOS, EOS]])
def test_documents_without_text_stay(tokenizer: Tokenizer, document: list[int]) -> None:
    assert fim(tokenizer).apply(np.array(document, dtype=np.int64), 3, 0).tolist() == document


def test_share_and_what_it_depends_on(tokenizer: Tokenizer) -> None:
    count, rate = 20_000, 0.1
    bound = 4 * math.sqrt(count * rate * (1 - rate))
    chosen = {(seed, epoch): fim(tokenizer, rate, seed).chosen(count, epoch) for seed in (1, 2) for epoch in (0, 1)}
    for found in chosen.values():
        assert abs(len(found) - rate * count) < bound and len(set(found.tolist())) == len(found)
        assert abs((found < count / 2).sum() - rate * count / 2) < bound
    both = len(set(chosen[1, 0].tolist()) & set(chosen[1, 1].tolist()))
    assert both < 0.02 * count, "another epoch has other documents"
    assert np.array_equal(fim(tokenizer, rate, 1).chosen(count, 0), chosen[1, 0])
    assert len({found.tobytes() for found in chosen.values()}) == 4
    ids = encoded(tokenizer, texts(1)[0] * 5)
    cuts = {
        (s, e, d): fim(tokenizer, seed=s).apply(ids, d, e).tobytes() for s in (1, 2) for e in (0, 1) for d in (4, 5)
    }
    assert len(set(cuts.values())) == 8
    assert fim(tokenizer, seed=1).apply(ids, 4, 0).tobytes() == cuts[1, 0, 4]
    assert not len(fim(tokenizer, 0.0).chosen(100, 0)) and len(fim(tokenizer, 1.0).chosen(100, 0)) == 100


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_an_epoch_holds_every_document_once_and_resumes_anywhere(
    tokenizer: Tokenizer, tmp_path: Path, packing: str
) -> None:
    """Each document is a line of its own; epochs differ in length."""
    lines = [f"{number:03d} {text}".replace("\n", " ") + "\n" for number, text in enumerate(texts(90))]
    with IndexedWriter(tmp_path / "t", 420) as writer:
        for line in lines:
            writer.write(np.append(encoded(tokenizer, line), EOS))
            writer.end_document()
    source = IndexedDataset(tmp_path / "t")
    options = {"seq_len": 24, "seed": 3, "vocab_size": 420, "document_mask": True, "packing": packing}
    change = fim(tokenizer, 0.3)

    def data() -> PackedDataset:
        return PackedDataset(source, every_document(source), cache=tmp_path / "c", fim=change, **options)  # type: ignore[arg-type]

    one, strings = data(), token_byte_strings(tokenizer)
    first, windows = 0, []
    sizes = [len(one._index(epoch)["shuffle"]) for epoch in range(4)]
    assert len(set(sizes)) > 1 and len(one) == sizes[0]
    for epoch, size in enumerate(sizes):
        index = one._index(epoch)
        order = [int(i) for i in np.argsort(index["shuffle"])]
        found = [one.window(first + i) for i in order]
        windows += [one.window(first + i) for i in range(size)]
        if packing == "stream":
            tokens = [*found[0].tokens, *(t for window in found[1:] for t in window.tokens[1:])]
            whole = b"".join(strings[i] for i in tokens).decode(errors="replace")
            complete = whole[: whole.rfind("\n")].count("\n") + 1
            assert complete >= 85 and tokens.count(EOS) >= 85
        else:
            places = Counter[int]()
            for window in found:
                real = window.tokens[: 25 - window.padding]
                places.update(real.tolist())
            assert places[EOS] == 90 and sum(places.values()) == int(index["lengths"].sum())
            chosen = index["chosen"].tolist()
            assert places[BEGIN] == places[HOLE] == places[END] == len(chosen) and 8 < len(chosen) < 50
            text = Counter[int]()
            for token, times in places.items():
                for byte in strings[token]:
                    text[byte] += times
            assert text == Counter("".join(lines).encode()), "every byte of the text once"
        first += size
    again = data()
    for sample in (first - 1, 0, sizes[0], sizes[0] - 1, first - sizes[-1]):
        assert np.array_equal(again.window(sample).tokens, windows[sample].tokens)


def written(tokenizer: Tokenizer, folder: Path, beside: bool = True) -> DataConfig:
    with IndexedWriter(folder / "t", 420) as writer:
        for text in texts(60):
            writer.write(np.append(encoded(tokenizer, text), EOS))
            writer.end_document()
    if beside:
        save_tokenizer(tokenizer, folder / "t.tokenizer.json")
    return DataConfig(source="indexed", paths=(str(folder / "t"),), vocab_size=420, cache_dir=str(folder / "c"),
                      validation_share=0.2, fim_rate=0.5)  # fmt: skip


def test_training_text_alone_is_rearranged(tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = open_data(written(tokenizer, tmp_path), seq_len=32, seed=1)
    seen = [part.batch(range(len(part))).inputs_BS for part in (data.train, data.validation)]
    assert [bool((tokens == BEGIN).any()) for tokens in seen] == [True, False]


def test_sentinels(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert sentinel_ids(tokenizer, ()) == (1, 2, 3)
    assert sentinel_ids(tokenizer, ("<|fim_middle|>", "<|fim_prefix|>", "<|fim_suffix|>")) == (3, 1, 2)
    sentence = "no token '<|fim_prefiks|>', which data.fim_tokens names: the nearest that it has is '<|fim_prefix|>'"
    with pytest.raises(DataError, match=re.escape(sentence)):
        sentinel_ids(tokenizer, ("<|fim_prefiks|>", "<|fim_suffix|>", "<|fim_middle|>"))
    deepseek = train_tokenizer(texts(50), 300)
    deepseek.add_special_tokens(["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"])
    assert sentinel_ids(deepseek, ()) == (300, 301, 302), "DeepSeek's come first"
    with pytest.raises(ConfigError, match=r"data\.fim_rate=0.5 needs a tokenizer and no path of data.paths has PREFIX"):
        open_data(written(tokenizer, tmp_path, beside=False), seq_len=32, seed=1)
    with pytest.raises(ConfigError, match=r"data\.fim_tokens has 2 names and takes 3"):
        DataConfig(fim_tokens=("a", "b"))
    for rate in (-0.1, 1.1):
        with pytest.raises(ValueError, match=rf"data\.fim_rate={rate} must be at least 0 and at most 1"):
            DataConfig(fim_rate=rate)
    assert open_fim(DataConfig(), None, 0) is None
