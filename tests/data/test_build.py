"""`open_data`: data are prepared once, figures are exact, and a bad input is one sentence with exit code 3 or 2."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

from fp8moe.data import build, sources
from fp8moe.data.build import open_data
from fp8moe.data.cache import key_of
from fp8moe.data.indexed import IndexedDataset
from fp8moe.data.packing import PackedDataset, every_document
from fp8moe.data.sources import DataConfig
from fp8moe.data.token_bytes import token_byte_strings
from fp8moe.data.tokenizer import file_hash, save_tokenizer, train_tokenizer
from fp8moe.errors import ConfigError, DataError

MakeTokens = Callable[..., IndexedDataset]


@pytest.fixture
def small_library(library: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sources, "standard_library_root", lambda: library)
    return library


def stdlib(cache: Path, **changes: object) -> DataConfig:
    options = {"vocab_size": 400, "validation_share": 0.15, "cache_dir": str(cache), **changes}
    return DataConfig(**options)  # type: ignore[arg-type]


def test_the_embedded_corpus(small_library: Path, tmp_path: Path) -> None:
    data = open_data(stdlib(tmp_path), seq_len=32, seed=1)
    assert data.tokenizer is not None and data.tokenizer.end_of_text == 0 and data.tokenizer.size == 400
    assert data.token_bytes is not None and data.token_bytes.shape == (400,) and data.token_bytes.dtype == torch.int64
    train, validation = sources.split_by_file(sources.read_corpus(small_library), 0.15)
    for dataset, documents in ((data.train, train), (data.validation, validation)):
        batch = dataset.batch(range(len(dataset)))
        whole = sum(len(document.text.encode()) for document in documents)
        covered = int(data.token_bytes[batch.labels_BS].sum())
        assert whole - 33 * 20 < covered <= whole  # all but the first token and the rest of the last window
        assert batch.document_lengths is None and int(batch.labels_BS.min()) >= 0
    assert data.bigram_bits_per_byte is not None and 3 < data.bigram_bits_per_byte < 6


def test_documents_are_the_files(small_library: Path, tmp_path: Path) -> None:
    data = open_data(stdlib(tmp_path), seq_len=32, seed=1)
    (folder,) = tmp_path.glob("stdlib-*")
    assert data.tokenizer is not None and data.tokenizer.path == folder / "tokenizer.json"
    strings = token_byte_strings(build.load_tokenizer(data.tokenizer.path))
    parts = sources.split_by_file(sources.read_corpus(small_library), 0.15)
    for name, documents in zip(("train", "validation"), parts, strict=True):
        stored = IndexedDataset(folder / name)
        assert len(stored) == len(documents)
        for number, document in enumerate(documents):
            ids = stored.tokens[stored.document_offsets[number] : stored.document_offsets[number + 1]].tolist()
            assert ids[-1] == 0 and ids.count(0) == 1
            assert b"".join(strings[i] for i in ids) == document.text.encode()


def test_a_second_opening_builds_nothing(small_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_data(stdlib(tmp_path / "a"), seq_len=32, seed=1, validation_samples=3)
    for name in ("train_tokenizer", "encode_pieces", "bigram_bits_per_byte"):
        monkeypatch.setattr(build, name, None)
    before = sorted(tmp_path.rglob("*"))
    again = open_data(stdlib(tmp_path / "a"), seq_len=32, seed=1, validation_samples=3)
    assert sorted(tmp_path.rglob("*")) == before
    assert torch.equal(first.train.batch(range(9)).inputs_BS, again.train.batch(range(9)).inputs_BS)
    assert first.bigram_bits_per_byte == again.bigram_bits_per_byte


def test_one_cache_keeps_different_settings_apart(small_library: Path, tmp_path: Path) -> None:
    def held_out(**changes: object) -> int:
        open_data(stdlib(tmp_path, **changes), seq_len=32, seed=1)
        newest = max(tmp_path.glob("stdlib-*"), key=lambda folder: folder.stat().st_mtime_ns)
        return len(IndexedDataset(newest / "validation"))

    assert held_out(validation_share=0.1) < held_out(validation_share=0.4)
    bigrams = [
        open_data(stdlib(tmp_path), seq_len=32, seed=1, validation_samples=samples).bigram_bits_per_byte
        for samples in (None, 1, 4)
    ]
    assert len(set(bigrams)) == 3


def test_another_cache_gives_the_same_data(small_library: Path, tmp_path: Path) -> None:
    one, two = (open_data(stdlib(tmp_path / name), seq_len=32, seed=1) for name in "ab")
    ids = range(len(one.train) + 5)
    assert torch.equal(one.train.batch(ids).inputs_BS, two.train.batch(ids).inputs_BS)
    assert one.bigram_bits_per_byte == two.bigram_bits_per_byte


def test_validation_text_does_not_follow_the_seed(small_library: Path, tmp_path: Path) -> None:
    one, two = (open_data(stdlib(tmp_path), seq_len=32, seed=seed) for seed in (1, 2))
    assert torch.equal(one.validation.batch(range(5)).inputs_BS, two.validation.batch(range(5)).inputs_BS)
    assert not torch.equal(one.train.batch(range(5)).inputs_BS, two.train.batch(range(5)).inputs_BS)


def test_the_document_mask_reaches_the_batch(small_library: Path, tmp_path: Path) -> None:
    plain, masked = (open_data(stdlib(tmp_path, document_mask=mask), seq_len=64, seed=1) for mask in (False, True))
    ids = range(len(plain.train))
    a, b = plain.train.batch(ids), masked.train.batch(ids)
    assert torch.equal(a.inputs_BS, b.inputs_BS) and b.document_lengths is not None
    hidden = b.labels_BS == -100
    assert torch.equal(hidden, a.inputs_BS == 0)  # exactly the first token of a document, after an end-of-text
    assert torch.equal(a.labels_BS[~hidden], b.labels_BS[~hidden])
    assert plain.bigram_bits_per_byte != masked.bigram_bits_per_byte


def test_the_first_prepares_and_the_others_wait(small_library: Path, tmp_path: Path) -> None:
    events: list[tuple[str, bool]] = []

    def barrier_of(name: str) -> Callable[[], None]:
        return lambda: events.append((name, any(tmp_path.glob("bigram-*"))))

    open_data(stdlib(tmp_path), seq_len=32, seed=1, is_first=True, barrier=barrier_of("first"))
    assert events == [("first", True)]
    shutil.rmtree(tmp_path)
    # On a node that does not share the cache, whoever comes after the barrier prepares for itself.
    open_data(stdlib(tmp_path), seq_len=32, seed=1, is_first=False, barrier=barrier_of("other"))
    assert events[1:] == [("other", False)] and any(tmp_path.glob("bigram-*"))


def test_processes_that_start_at_once_share_one_cache(library: Path, tmp_path: Path) -> None:
    program = (
        "import sys, hashlib; from pathlib import Path; from fp8moe.data import sources\n"
        "from fp8moe.data.build import open_data; from fp8moe.data.sources import DataConfig\n"
        "sources.standard_library_root = lambda: Path(sys.argv[1])\n"
        "config = DataConfig(vocab_size=400, validation_share=0.15, cache_dir=sys.argv[2])\n"
        "data = open_data(config, seq_len=32, seed=1)\n"
        "tokens = data.train.batch(range(len(data.train) + 3)).inputs_BS.numpy().tobytes()\n"
        "print(hashlib.sha256(tokens).hexdigest(), data.bigram_bits_per_byte)"
    )
    command = [sys.executable, "-c", program, str(library), str(tmp_path / "c")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = [subprocess.Popen(command, env=environment, **pipes) for _ in range(2)]  # type: ignore[call-overload]
    try:
        answers = [process.communicate(timeout=240)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], answers
    assert len(set(answers)) == 1, answers
    assert len(list((tmp_path / "c").glob("stdlib-*"))) == 1
    assert not [path for path in (tmp_path / "c").glob(".*") if path.is_dir()]


def test_names_of_prepared_folders_never_change(small_library: Path, tmp_path: Path) -> None:
    """Data prepared by an earlier version must still be found: a name may change only with a new format."""
    data = open_data(stdlib(tmp_path), seq_len=32, seed=1, validation_samples=2)
    assert data.tokenizer is not None
    content = sources.content_key(sources.read_corpus(small_library))
    prepared = key_of(1, list(sys.version_info[:3]), content, 400, 0.15, "trained", tokenizers.__version__)
    texts = [data.train.fingerprint, data.validation.fingerprint, file_hash(data.tokenizer.path)]
    tokens = [IndexedDataset(tmp_path / f"stdlib-{prepared}" / name) for name in ("train", "validation")]
    names = {f"stdlib-{prepared}", f"bigram-{key_of(1, texts, False, 2)}"}
    names |= {f"checked-{key_of(part.fingerprint, 400)}" for part in tokens}
    options = {"seq_len": 32, "vocab_size": 400, "document_mask": False, "cache": tmp_path}
    for part, seed, opened in zip(tokens, (1, 0), (data.train, data.validation), strict=True):
        same = PackedDataset(part, every_document(part), seed=seed, **options)  # type: ignore[arg-type]
        assert same.fingerprint == opened.fingerprint  # the validation order is that of seed 0
        names.add(f"order-{same.fingerprint}-0")
    assert {path.name for path in tmp_path.iterdir() if path.name[0] != "."} == names


def test_a_given_tokenizer(small_library: Path, tmp_path: Path) -> None:
    save_tokenizer(train_tokenizer(["some other text, not the corpus " * 50], 300), tmp_path / "t.json")
    data = open_data(stdlib(tmp_path / "c", tokenizer=str(tmp_path / "t.json")), seq_len=32, seed=1)
    assert data.tokenizer is not None and data.tokenizer.size < 300
    assert data.token_bytes is not None and data.token_bytes.shape == (400,)
    with pytest.raises(
        ConfigError,
        match=r"ids up to \d+ and data.vocab_size, .*, is 260: use model.vocab_size=\d+",
    ):
        open_data(stdlib(tmp_path / "c", tokenizer=str(tmp_path / "t.json"), vocab_size=260), seq_len=32, seed=1)
    with pytest.raises(DataError, match=r"none.json does not exist"):
        open_data(stdlib(tmp_path / "c", tokenizer=str(tmp_path / "none.json")), seq_len=32, seed=1)


def test_an_empty_or_missing_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "standard_library_root", lambda: tmp_path / "nothing")
    with pytest.raises(DataError, match="found 0") as caught:
        open_data(stdlib(tmp_path / "c"), seq_len=32, seed=1)
    assert caught.value.exit_code == 3 and not (tmp_path / "c").exists()


def indexed(tmp_path: Path, *names: str, **changes: object) -> DataConfig:
    options = {"paths": tuple(str(tmp_path / name) for name in names), "vocab_size": 1000, **changes}
    return DataConfig(source="indexed", cache_dir=str(tmp_path / "c"), **options)  # type: ignore[arg-type]


def test_token_files_without_a_tokenizer(make_tokens: MakeTokens, tmp_path: Path) -> None:
    make_tokens([[i] * 9 for i in range(100)], name="a")
    data = open_data(indexed(tmp_path, "a", validation_share=0.1), seq_len=8, seed=1)
    assert data.tokenizer is None and data.token_bytes is None and data.bigram_bits_per_byte is None
    assert len(list((tmp_path / "c").glob("order-*-0"))) == 2  # the first epochs are prepared before training
    seen = [set(part.batch(range(len(part))).inputs_BS.flatten().tolist()) for part in (data.train, data.validation)]
    assert not seen[0] & seen[1] and len(seen[0]) >= 89 and len(seen[1]) >= 9


def test_without_weights_token_files_have_equal_shares(make_tokens: MakeTokens, tmp_path: Path) -> None:
    for name, base in (("a", 0), ("b", 500)):
        make_tokens([[base + i] * 9 for i in range(60)], name=name)
    one, two = (open_data(indexed(tmp_path, "a", "b", validation_share=0.2), seq_len=8, seed=seed) for seed in (1, 2))
    for part in (one.train, one.validation):
        assert (part.batch(range(20)).inputs_BS[:, 0] // 500).sum() == 10
    uneven = open_data(indexed(tmp_path, "a", "b", validation_share=0.2, weights=(1.0, 3.0)), seq_len=8, seed=1)
    for part in (uneven.train, uneven.validation):
        assert (part.batch(range(12)).inputs_BS[:, 0] // 500).sum() == 9
    assert torch.equal(one.validation.batch(range(20)).inputs_BS, two.validation.batch(range(20)).inputs_BS)
    assert not torch.equal(one.train.batch(range(20)).inputs_BS, two.train.batch(range(20)).inputs_BS)


def test_blends_and_separate_validation_files(make_tokens: MakeTokens, tmp_path: Path) -> None:
    for name, base in (("a", 0), ("b", 100), ("v", 200), ("w", 300)):
        make_tokens([[base + i] * 9 for i in range(50 if name != "w" else 10)], name=name)
    config = indexed(
        tmp_path, "a", "b", weights=(3.0, 1.0), validation_paths=(str(tmp_path / "v"), str(tmp_path / "w"))
    )
    data = open_data(config, seq_len=8, seed=1)
    origin = (data.train.batch(range(40)).inputs_BS[:, 0] // 100).tolist()
    assert origin.count(0) == 30 and origin.count(1) == 10
    held_out = (data.validation.batch(range(len(data.validation))).inputs_BS // 100).flatten()
    assert set(held_out.tolist()) == {2, 3} and len(data.validation) == 56 + 11


def test_the_tokenizer_beside_the_files(make_tokens: MakeTokens, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["a b c " * 99], 260)
    ids = tokenizer.encode("a b c d e f g h " * 40).ids
    for name in "ab":
        make_tokens([[*ids, 0], [*ids, 0]], 1000, name)
        save_tokenizer(tokenizer, f"{tmp_path / name}.tokenizer.json")
    data = open_data(indexed(tmp_path, "a", "b"), seq_len=8, seed=1)
    assert data.tokenizer is not None and data.tokenizer.path == tmp_path / "a.tokenizer.json"
    assert data.token_bytes is not None and int(data.token_bytes.sum()) == 256
    assert data.bigram_bits_per_byte is not None
    save_tokenizer(
        train_tokenizer(["x"], 260).from_str(tokenizer.to_str().replace("fim", "mif")), f"{tmp_path}/b.tokenizer.json"
    )
    with pytest.raises(DataError, match=r"a.tokenizer.json and .*b.tokenizer.json differ: .* can't be mixed"):
        open_data(indexed(tmp_path, "a", "b"), seq_len=8, seed=1)
    with pytest.raises(DataError, match="can't be mixed"):
        open_data(indexed(tmp_path, "a", validation_paths=(f"{tmp_path}/b",)), seq_len=8, seed=1)
    with pytest.raises(
        ConfigError,
        match=r"ids up to 259 and data.vocab_size, .*, is 255: use model.vocab_size=384",
    ):
        open_data(indexed(tmp_path, "a", vocab_size=255), seq_len=8, seed=1)
    nameless = tmp_path / "n.json"
    nameless.write_text(tokenizer.to_str().replace("<|endoftext|>", "<|stop|>"))
    unknown = open_data(indexed(tmp_path, "a", "b", tokenizer=str(nameless)), seq_len=8, seed=1).tokenizer
    assert unknown is not None and unknown.end_of_text is None and unknown.size == 260
    chosen = open_data(indexed(tmp_path, "a", "b", tokenizer=f"{tmp_path}/a.tokenizer.json"), seq_len=8, seed=1)
    assert chosen.bigram_bits_per_byte == data.bigram_bits_per_byte


def test_a_token_past_the_vocabulary_is_found_at_the_start(make_tokens: MakeTokens, tmp_path: Path) -> None:
    make_tokens([list(range(500)), [3, 999, 4]], name="a")
    with pytest.raises(
        DataError,
        match=r"a.bin: token 501 has id 999, .* of 999: ids go up to 999, use model.vocab_size=1024",
    ):
        open_data(indexed(tmp_path, "a", vocab_size=999), seq_len=8, seed=1)
    open_data(indexed(tmp_path, "a"), seq_len=2, seed=1)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([[1] * 17], r"has 17 tokens in 1 document, .* 2 \* \(seq_len \+ 1\) = 18: use seq_len=7 or add text"),
        ([[1] * 40, [2] * 3], "has 3 tokens in 1 documents and a sample needs seq_len \\+ 1 = 9"),
        (None, "does not exist"),
    ],
)
def test_too_little_or_none(
    make_tokens: MakeTokens, tmp_path: Path, documents: list[list[int]] | None, message: str
) -> None:
    if documents is not None:
        make_tokens(documents, name="a")
    with pytest.raises(DataError, match=message) as caught:
        open_data(indexed(tmp_path, "a", validation_share=0.5), seq_len=8, seed=1)
    assert "\n" not in str(caught.value)


def test_a_bad_seq_len_is_a_configuration_error(small_library: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="seq_len=0"):
        open_data(stdlib(tmp_path), seq_len=0, seed=1)


def test_the_real_corpus(tmp_path: Path) -> None:
    """The standard library of this very interpreter, as a newcomer's first run prepares it."""
    data = open_data(DataConfig(cache_dir=str(tmp_path)), seq_len=256, seed=0)
    assert len(data.train) > 4000 and len(data.validation) > 100
    assert data.bigram_bits_per_byte is not None and 3.2 < data.bigram_bits_per_byte < 3.8
    (folder,) = tmp_path.glob("bigram-*")
    assert json.loads((folder / "bits_per_byte.json").read_text()) == data.bigram_bits_per_byte
    assert np.mean([len(string) for string in token_byte_strings(build.load_tokenizer(data.tokenizer.path))]) > 3  # type: ignore[union-attr]
