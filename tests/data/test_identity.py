"""The identity of data is its content: copies are equal, one changed token is not, and each cause has its sentence."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from fp8moe.data.fim import fim_in_words
from fp8moe.data.identity import BLOCK_BYTES, CHANGES, DataIdentity, check_same_data, content_hash, short
from fp8moe.data.indexed import IndexedDataset, IndexedWriter
from fp8moe.data.packing import PackedDataset, every_document
from fp8moe.data.sampler import BlendedDataset
from fp8moe.data.sources import DataConfig
from fp8moe.errors import ConfigError

HERE = DataIdentity("train", "validation", "tokenizer", document_mask=False, validation_share=0.2)


def test_a_hash_is_shown_by_its_beginning_and_words_whole() -> None:
    shown = dataclasses.replace(HERE, tokenizer="0123456789abcdef" * 4, fim="data.fim_rate=0.1 data.fim_tokens=a,b,c")
    assert {name: short(value) for name, value in shown.as_stored().items()} == {
        **{"train": "train", "validation": "validation", "tokenizer": "0123456789ab", "document_mask": "false"},
        **{"validation_share": "0.2", "packing": "stream", "fim": "data.fim_rate=0.1 data.fim_tokens=a,b,c"},
    }


def write(prefix: Path, seed: int) -> PackedDataset:
    with IndexedWriter(prefix, 1000) as writer:
        for ids in np.random.RandomState(seed).randint(0, 1000, (20, 50)):
            writer.write(ids)
            writer.end_document()
    return packed(prefix)


def packed(prefix: Path) -> PackedDataset:
    source = IndexedDataset(prefix)
    return PackedDataset(
        source, every_document(source), seq_len=8, seed=0, vocab_size=1000, document_mask=False, cache=prefix.parent
    )


def test_content_is_the_same_wherever_files_lie(tmp_path: Path) -> None:
    first, other = write(tmp_path / "a", 0), write(tmp_path / "b", 1)
    assert first.content() != other.content()
    for ending in (".bin", ".idx"):
        shutil.copyfile(tmp_path / f"a{ending}", tmp_path / f"c{ending}")
        os.utime(tmp_path / f"c{ending}", (1, 1))
    assert packed(tmp_path / "c").content() == first.content()
    assert packed(tmp_path / "c").fingerprint != first.fingerprint, "which names caches"
    half = BlendedDataset([first, other], [1, 1], document_mask=False)
    assert half.content() == BlendedDataset([packed(tmp_path / "c"), other], [1, 1], document_mask=False).content()
    assert half.content() != BlendedDataset([first, other], [1, 2], document_mask=False).content()
    assert half.content() != BlendedDataset([other, first], [1, 1], document_mask=False).content()


@pytest.mark.parametrize("size", [0, 1, 1000, BLOCK_BYTES + 1, 70 * BLOCK_BYTES])
def test_hash_of_a_file(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    content = bytearray(np.random.RandomState(0).bytes(size))
    path.write_bytes(content)
    first = content_hash(path)
    assert content_hash(path) == first
    for at in {0, size - 1} if size else ():
        changed = content.copy()
        changed[at] ^= 1
        path.write_bytes(changed)
        assert content_hash(path) != first
    path.write_bytes(content + b"\0")
    assert content_hash(path) != first


@pytest.mark.parametrize(
    ("changed", "change", "sentence"),
    [
        ({"document_mask": True}, "document_mask", "with data.document_mask=true and this run has false: use true"),
        ({"validation_share": 0.1, "train": "x"}, "validation_share", r"with data.validation_share=0.1 and this run h"),
        ({"tokenizer": "x", "train": "x"}, "tokenizer", "with another tokenizer than this run's: use data.tokenizer="),
        ({"packing": "documents"}, "packing", "with data.packing=documents and this run has stream: use documents"),
        (
            {"fim": "data.fim_rate=0.1"},
            "fim",
            "with data.fim_rate=0.1 and this run has data.fim_rate=0: use the former",
        ),
        ({"validation": "x"}, "data", "on other text than this run reads: use its own data settings"),
        ({"train": "x"}, "data", "on other text than this run reads: use its own data settings"),
    ],
)
def test_each_difference_has_its_sentence_and_can_be_meant(changed, change, sentence) -> None:
    stored = dataclasses.replace(HERE, **changed).as_stored()
    others = tuple(name for name in CHANGES if name != change)
    with pytest.raises(ConfigError, match=sentence) as refused:
        check_same_data(Path("run"), stored, HERE, others)
    assert f"resume_changes=[{change}] if it is meant" in str(refused.value)
    check_same_data(Path("run"), stored, HERE, (change,))
    check_same_data(Path("run"), HERE.as_stored(), HERE, ())


def test_a_checkpoint_from_before_packing_and_fim_is_one_without() -> None:
    stored = {name: value for name, value in HERE.as_stored().items() if name not in ("packing", "fim")}
    check_same_data(Path("run"), stored, HERE, ())
    with pytest.raises(ConfigError, match=r"with data\.packing=stream and this run has documents"):
        check_same_data(Path("run"), stored, dataclasses.replace(HERE, packing="documents"), ())


def test_fim_in_words() -> None:
    assert fim_in_words(DataConfig()) == HERE.fim
    assert fim_in_words(DataConfig(fim_rate=0.1)) == "data.fim_rate=0.1"
    assert (
        fim_in_words(DataConfig(fim_rate=0.1, fim_tokens=("a", "b", "c")))
        == "data.fim_rate=0.1 data.fim_tokens=[a,b,c]"
    )
