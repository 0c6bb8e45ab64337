"""Broken data files, a hundred of them by a fixed seed: one sentence with its exit code, or the data as it reads.

A changed token that is still within the vocabulary is text like any other, so a fuzzed `.bin` may open; then every
window can be read.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from fp8moe.__main__ import main
from fp8moe.cli import tokenize
from fp8moe.data.build import open_data
from fp8moe.data.cache import built_folder
from fp8moe.data.indexed import IndexedDataset, IndexedWriter
from fp8moe.data.readers import find_files
from fp8moe.data.sources import DataConfig
from fp8moe.data.tokenizer import load_tokenizer
from fp8moe.errors import ConfigError, DataError
from tests.train.runs import SMALL, VOCABULARY, write_corpus

ENDINGS = (".bin", ".idx", ".tokenizer.json")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


def fuzz(content: bytes, random_: random.Random) -> bytes:
    """One of: bytes flipped, cut off, lengthened, a run of bytes replaced, empty."""
    changed, kind = bytearray(content), random_.randrange(5)
    if kind == 0:
        for _ in range(random_.randint(1, 8)):
            end = random_.choice((34, len(changed)))  # 34: in the header of an index
            changed[random_.randrange(end)] ^= 1 << random_.randrange(8)
    elif kind == 1:
        del changed[random_.randrange(len(changed)) :]
    elif kind == 2:
        changed += random_.randbytes(random_.randint(1, 99))
    elif kind == 3:
        start = random_.randrange(len(changed))
        changed[start : start + 16] = random_.choice((b"\xff", b"\x00", b"\x7f", b"[")) * 16
    else:
        changed.clear()
    return bytes(changed)


def read_all(prefix: Path, cache: Path) -> None:
    config = DataConfig(
        source="indexed", paths=(str(prefix),), vocab_size=VOCABULARY, cache_dir=str(cache), validation_share=0.2
    )
    data = open_data(config, seq_len=32, seed=0, validation_samples=8)
    for part in (data.train, data.validation):
        for number in range(len(part)):
            part.window(number)


def test_a_hundred_fuzzed_files(corpus: Path, tmp_path: Path) -> None:
    """Every error is a DataError or ConfigError of one line that names a file; the files stay as they were."""
    refused = 0
    for seed in range(100):
        random_ = random.Random(seed)
        folder, ending = tmp_path / str(seed), ENDINGS[seed % 3]
        folder.mkdir()
        for name in ENDINGS:
            shutil.copy(corpus / f"grammar{name}", folder)
        broken = folder / f"grammar{ending}"
        broken.write_bytes(content := fuzz(broken.read_bytes(), random_))
        try:
            read_all(folder / "grammar", tmp_path / "cache")
        except (DataError, ConfigError) as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 600, (seed, error)
            if isinstance(error, DataError):
                assert str(folder) in str(error) or "tokenizer" in str(error), (seed, error)
        assert broken.read_bytes() == content and len(list(folder.iterdir())) == 3
    assert refused > 70


def flip_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[9] ^= 2
    path.write_bytes(content)


def in_place_of(path: Path) -> None:
    path.unlink()
    path.mkdir()


def large_ids(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2] + b"\xff\xff")


class Runs:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self.path), "w")


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps(Runs(path.with_name("ran"))))


FAULTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "truncated": (".bin", lambda path: path.write_bytes(path.read_bytes()[:-3]), "bytes and its index says"),
    "empty": (".bin", lambda path: path.write_bytes(b""), "has 0 bytes and its index says"),
    "empty index": (".idx", lambda path: path.write_bytes(b""), "has 0 bytes and its header alone has"),
    "another version": (".idx", flip_header, "has version 3 and only version 1"),
    "a folder": (".bin", in_place_of, "does not exist: a data set is two files"),
    "a folder for the index": (".idx", in_place_of, "does not exist: a data set is two files"),
    "a pickle": (".bin", pickled, "bytes and its index says"),
    "a pickle for the index": (".idx", pickled, "instead of b'MMIDIDX"),
    "ids past the vocabulary": (".bin", large_ids, f"has id 65535, outside a vocabulary of {VOCABULARY}"),
    "no tokenizer": (".tokenizer.json", lambda path: path.write_text("{"), "is not a tokenizer.json"),
    "not UTF-8": (".tokenizer.json", lambda path: path.write_bytes(b"\xff\xfe{"), "is not a tokenizer.json"),
    "a pickled tokenizer": (".tokenizer.json", pickled, "is not a tokenizer.json"),
    "nested": (".tokenizer.json", lambda path: path.write_text("[" * 99999), "is not a tokenizer.json"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_by_the_command_line(fault: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 3, one sentence; no code ran, no cache, and no run directory but for the logs of one that prepared."""
    ending, damage, said = FAULTS[fault]
    for name in ENDINGS:
        shutil.copy(corpus / f"grammar{name}", tmp_path)
    damage(tmp_path / f"grammar{ending}")
    prefix, run_dir = tmp_path / "grammar", tmp_path / "run"
    words = ["data=indexed", f"data.paths=[{prefix}]", f"data.cache_dir={tmp_path / 'cache'}", f"run_dir={run_dir}"]
    assert main(["train", *SMALL, *words, "precision=bf16"]) == 3
    errors = capsys.readouterr().err
    assert errors.startswith("fp8moe: ") and errors.count("\n") == 1 and said in errors, errors
    assert not (tmp_path / "ran").exists()
    if ending != ".bin" or fault != "ids past the vocabulary":
        assert not run_dir.exists() and not (tmp_path / "cache").exists()
    else:
        assert {path.name for path in run_dir.iterdir()} == {"logs", "starts.jsonl"}


def test_a_sentinel_that_the_tokenizer_lacks(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data=indexed", f"data.paths=[{corpus / 'grammar'}]", f"data.cache_dir={tmp_path / 'cache'}"]
    words += [f"run_dir={tmp_path / 'run'}", "data.fim_rate=0.1", "precision=bf16"]
    names = 'data.fim_tokens=["<|fim_prefix|>","<|fim_sufix|>","<|fim_middle|>"]'
    assert main(["train", *SMALL, *words, names]) == 3
    said = capsys.readouterr().err
    assert said.startswith("fp8moe: ") and said.count("\n") == 1
    assert "no token '<|fim_sufix|>', which data.fim_tokens names: the nearest that it has is '<|fim_suffix|>'" in said


def refuses(name: str, real: Callable[..., object]) -> Callable[..., object]:
    """`real`, but where its path ends in `name` access is denied; root may read everything."""

    def call(path: object, *args: object, **kwargs: object) -> object:
        if str(path).endswith(name):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    return call


@pytest.mark.parametrize("name", ["grammar.bin", "grammar.idx", "grammar.tokenizer.json"])
@pytest.mark.parametrize("owner", ["open", "stat"])
def test_a_file_without_access(
    name: str, owner: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if owner == "open":
        for module in ("builtins.open", "io.open"):
            monkeypatch.setattr(module, refuses(name, open))
    else:
        monkeypatch.setattr(os, "stat", refuses(name, os.stat))
    with pytest.raises(DataError, match=rf"{name} can't be read \(Permission denied\): check the path"):
        read_all(corpus / "grammar", tmp_path / "cache")


def test_a_damaged_cache(corpus: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    read_all(corpus / "grammar", cache)
    (figure,) = cache.glob("bigram-*/bits_per_byte.json")
    kept = figure.read_text()
    for text in ("", "{}", "[" * 9999, "null"):
        figure.write_text(text)
        with pytest.raises(DataError, match=r"bits_per_byte.json can't be read .*: delete "):
            read_all(corpus / "grammar", cache)
    figure.write_text(kept)
    for order in cache.glob("order-*/*.npy"):
        content = order.read_bytes()
        negative = content[:128] + b"\xff" * 8 + content[136:]  # the header has 128 bytes
        for text in (b"", content[:200], negative, pickle.dumps(Runs(tmp_path / "ran"))):
            order.write_bytes(text)
            with pytest.raises(DataError, match="the cached sample order"):
                read_all(corpus / "grammar", cache)
        order.write_bytes(content)
    assert not (tmp_path / "ran").exists()
    read_all(corpus / "grammar", cache)


def test_a_cache_without_access(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "stat", refuses("thing", os.stat))
    with pytest.raises(DataError, match=r"the data cache .* can't be written \(Permission denied\)"):
        built_folder(tmp_path, "thing", lambda folder: None)


def test_a_tokenizer_without_a_token_or_with_ids_that_no_file_holds(corpus: Path, tmp_path: Path) -> None:
    content = json.loads((corpus / "grammar.tokenizer.json").read_text())
    empty = content | {"added_tokens": [], "model": content["model"] | {"vocab": {}, "merges": []}}
    large = content | {"model": content["model"] | {"vocab": content["model"]["vocab"] | {"new": 2**31}}}
    for name, text, said in (("empty", empty, "vocabulary of 0 tokens"), ("large", large, "has ids up to 2147483648")):
        (tmp_path / name).write_text(json.dumps(text))
        with pytest.raises(DataError, match=said):
            load_tokenizer(tmp_path / name)


def test_a_panic_of_the_library_is_a_sentence(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):  # as that of pyo3
        pass

    def panic(text: str) -> Tokenizer:
        raise PanicException("called `Option::unwrap()`\n on a `None` value")

    monkeypatch.setattr("fp8moe.data.tokenizer.Tokenizer.from_str", panic, raising=False)
    with pytest.raises(DataError, match="can read \\(called `Option::unwrap\\(\\)` on a `None` value\\)"):
        load_tokenizer(corpus / "grammar.tokenizer.json")


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in" / "closed").mkdir(parents=True)
    (tmp_path / "in" / "a.txt").write_text("text")
    (tmp_path / "in" / "closed" / "b.txt").write_text("text")
    assert [path.name for path in find_files([str(tmp_path / "in")]).files] == ["a.txt", "b.txt"]
    monkeypatch.setattr(os, "scandir", refuses("closed", os.scandir))
    with pytest.raises(DataError, match=r"closed can't be read \(Permission denied\)"):
        find_files([str(tmp_path / "in")])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": "a", "n": ' + b"[" * 99999, "line 1 can't be read as JSON (maximum recursion depth"),
        (b'{"text": ' + b"1" * 5000 + b"}", "line 1 can't be read as JSON (Exceeds the limit"),
        (b'{"a\\nb": 1}', "line 1 has no key 'text', it has a b: use --text-key"),
        (json.dumps({"k" * 9999: 1}).encode(), "kkk...: use --text-key"),
        (b'{"a b": "of text", "n": "1"}', "it has a b, n: use --text-key 'a b'"),
        (b'{"messages": []}', "it has messages: fp8moe sft learns from conversations as they are"),
        (b'{"text": "broken', "line 1 is not JSON (Invalid control character at column 17): write one JSON object"),
        (b'{"text": "\xff"}', "is not UTF-8 text (byte 0xff"),
    ],
)
def test_lines_that_are_no_documents(
    line: bytes, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_bytes(line + b"\n")
    assert tokenize.main(["--input", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "new" / "out")]) == 3
    errors = capsys.readouterr().err
    assert said in errors and errors.count("\n") == 1 and len(errors) < 600, errors
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"], "not even the folder of the output"


def test_an_index_of_its_own_is_read(corpus: Path) -> None:
    """What the faults above change is right without them, and the pickle would run."""
    assert len(IndexedDataset(corpus / "grammar")) == 400
    pickle.loads(pickle.dumps(Runs(corpus / "ran")))
    assert (corpus / "ran").exists()


def test_what_lies_at_a_prefix_is_named(tmp_path: Path) -> None:
    prefix = tmp_path / "my tokens"
    with IndexedWriter(prefix, 300) as writer:
        writer.write(np.array([1, 2]))
        writer.end_document()
    (tmp_path / "text.jsonl").touch()
    for given, says in (
        (f"{prefix}.bin", f"{prefix}.bin is one of two files, which are given by their PREFIX: use {prefix}"),
        (f"{prefix}.idx", f"{prefix}.idx is one of two files, which are given by their PREFIX: use {prefix}"),
        (f"{tmp_path}", f"{tmp_path} is a folder and token files are given by their PREFIX: use {prefix}"),
        (f"{tmp_path}/none", f"{tmp_path}/none.idx does not exist: a data set is two files, PREFIX.bin and PREFIX.idx, "
         "given as PREFIX (`fp8moe tokenize` writes them)"),
        (f"{tmp_path}/text.jsonl", f"{tmp_path}/text.jsonl holds no token ids: fp8moe tokenize --input {tmp_path}/text."
         "jsonl --output PREFIX makes token files of text, and fp8moe sft reads conversations"),
    ):  # fmt: skip
        with pytest.raises(DataError) as caught:
            IndexedDataset(given)
        assert str(caught.value) == says
