"""The token files, against a reader and a writer made here from the format's description with nothing but struct."""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from fp8moe.data import indexed
from fp8moe.data.indexed import IndexedDataset, IndexedWriter, dtype_for
from fp8moe.errors import DataError

CODE_OF = {"B": 1, "b": 2, "h": 3, "i": 4, "q": 5, "H": 8}


def take(raw: bytes, at: int, letter: str, count: int) -> tuple[list[int], int]:
    size = struct.calcsize("<" + letter) * count
    return list(struct.unpack_from(f"<{count}{letter}", raw, at)), at + size


def read_by_hand(prefix: Path) -> tuple[int, list[list[int]], list[int]]:
    """(type code, sequences, document boundaries) by the description alone."""
    index, tokens = Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()
    assert index[:9] == b"MMIDIDX\0\0"
    (version,), at = take(index, 9, "Q", 1)
    (code,), at = take(index, at, "B", 1)
    (num_sequences, num_boundaries), at = take(index, at, "Q", 2)
    lengths, at = take(index, at, "i", num_sequences)
    pointers, at = take(index, at, "q", num_sequences)
    boundaries, at = take(index, at, "q", num_boundaries)
    assert version == 1 and at == len(index)
    letter = {code: letter for letter, code in CODE_OF.items()}[code]
    sequences = [take(tokens, pointer, letter, length)[0] for pointer, length in zip(pointers, lengths, strict=True)]
    assert sum(map(len, sequences)) * struct.calcsize(letter) == len(tokens)
    return code, sequences, boundaries


def write_by_hand(prefix: Path, letter: str, sequences: list[list[int]], boundaries: list[int]) -> None:
    size = struct.calcsize("<" + letter)
    lengths = [len(sequence) for sequence in sequences]
    pointers = [size * sum(lengths[:i]) for i in range(len(lengths))]
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, CODE_OF[letter], len(lengths), len(boundaries))
    body = struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(lengths)}q", *pointers)
    Path(f"{prefix}.idx").write_bytes(head + body + struct.pack(f"<{len(boundaries)}q", *boundaries))
    flat = [token for sequence in sequences for token in sequence]
    Path(f"{prefix}.bin").write_bytes(struct.pack(f"<{len(flat)}{letter}", *flat))


@pytest.mark.parametrize(("vocab_size", "code"), [(300, 8), (65536, 8), (65537, 4), (200_000, 4)])
def test_written_files_follow_the_description(tmp_path: Path, vocab_size: int, code: int) -> None:
    random = np.random.RandomState(0)
    documents = [random.randint(0, vocab_size, random.randint(1, 50)) for _ in range(40)]
    documents[3] = np.array([vocab_size - 1, 0])
    with IndexedWriter(tmp_path / "x", vocab_size) as writer:
        for document in documents:
            writer.write(document[:7])
            writer.write(document[7:])
            writer.end_document()
        writer.end_document()  # an empty document leaves no trace
    found_code, sequences, boundaries = read_by_hand(tmp_path / "x")
    assert found_code == code
    assert sequences == [document.tolist() for document in documents]
    assert boundaries == list(range(41))
    assert writer.num_documents == 40 and writer.num_tokens == sum(map(len, documents))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx"]


@pytest.mark.parametrize("letter", sorted(CODE_OF))
def test_reads_files_of_others_in_every_integer_type(tmp_path: Path, letter: str) -> None:
    sequences = [[1, 2, 3], [4], [], [5, 6], [127]]
    write_by_hand(tmp_path / "y", letter, sequences, [0, 2, 3, 3, 5])
    data = IndexedDataset(tmp_path / "y")
    documents = [
        data.tokens[a:b].tolist() for a, b in zip(data.document_offsets, data.document_offsets[1:], strict=False)
    ]
    assert documents == [[1, 2, 3, 4], [], [], [5, 6, 127]] and len(data) == 4
    assert data.tokens.dtype == np.dtype("<" + letter)
    assert isinstance(data.tokens, np.memmap)


def test_type_of_ids_follows_the_vocabulary() -> None:
    assert dtype_for(2**16) == np.uint16 and dtype_for(2**16 + 1) == np.int32


@pytest.mark.parametrize(("vocab_size", "bytes_an_id"), [(65535, 2), (65536, 2), (65537, 4)])
def test_the_largest_id_comes_back_on_both_sides_of_uint16(tmp_path: Path, vocab_size: int, bytes_an_id: int) -> None:
    ids = [0, vocab_size - 1, 1, 255, 256, 32767, 32768, vocab_size - 2]
    with IndexedWriter(tmp_path / "x", vocab_size) as writer:
        writer.write(np.array(ids))
        writer.end_document()
    data = IndexedDataset(tmp_path / "x")
    assert data.tokens.tolist() == ids and data.bin_path.stat().st_size == 8 * bytes_an_id
    data.check_vocabulary(vocab_size)
    with pytest.raises(
        DataError, match=f"token 1 has id {vocab_size - 1}, .*: ids go up to {vocab_size - 1}, use model.vocab_size=65"
    ):
        data.check_vocabulary(vocab_size - 1)


@pytest.mark.parametrize("chunk", [1, 2, 3, 4])
def test_chunks_of_the_index_may_end_inside_a_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(indexed, "_CHUNK", chunk)
    write_by_hand(tmp_path / "y", "i", [[1, 2, 3], [4], [], [5, 6], [7, 8, 9, 10]], [0, 3, 4, 4, 5])
    data = IndexedDataset(tmp_path / "y")
    assert data.document_offsets.tolist() == [0, 4, 6, 6, 10] and data.tokens.tolist() == list(range(1, 11))
    data.check_vocabulary(11)
    with pytest.raises(DataError, match="token 6 has id 7"):
        data.check_vocabulary(7)
    path = tmp_path / "y.idx"
    whole = path.read_bytes()
    for sequence in range(5):  # its pointer, one byte off: found in whichever chunk it is
        at = 34 + 4 * 5 + 8 * sequence
        path.write_bytes(whole[:at] + struct.pack("<q", 4 * [0, 3, 4, 4, 6][sequence] + 1) + whole[at + 8 :])
        with pytest.raises(DataError, match=rf"sequence {sequence} of .* starts at byte \d*[13579] instead of"):
            IndexedDataset(tmp_path / "y")
    for place, value in ((1, 5), (2, 2), (2, 6), (3, 3), (3, 6)):  # a single step back, in any chunk or between two
        at = 34 + 12 * 5 + 8 * place
        path.write_bytes(whole[:at] + struct.pack("<q", value) + whole[at + 8 :])
        with pytest.raises(DataError, match="don't run from 0 to 5 in order"):
            IndexedDataset(tmp_path / "y")


def put(at: int, letter: str, value: int):  # type: ignore[no-untyped-def]
    return lambda raw: raw[:at] + struct.pack("<" + letter, value) + raw[at + struct.calcsize("<" + letter) :]


# The file below: 3 sequences of 3, 1 and 2 uint16 in 2 documents; lengths at 34, pointers at 46, boundaries at 70.
BREAKS = {
    "empty": (lambda raw: b"", "0 bytes and its header alone has 34"),
    "half a header": (lambda raw: raw[:20], "20 bytes and its header alone has 34"),
    "cut": (lambda raw: raw[:-1], "93 bytes and its header says 94"),
    "longer": (lambda raw: raw + b"\0", "95 bytes and its header says 94"),
    "multimodal": (lambda raw: raw + b"\0\0\0", "a mode for each of its 3 sequences"),
    "magic": (lambda raw: b"X" + raw[1:], "starts with"),
    "version": (put(9, "Q", 2), "version 2"),
    "float ids": (put(17, "B", 7), "type code 7"),
    "unknown type": (put(17, "B", 99), "type code 99"),
    "wider type": (put(17, "B", 4), "starts at byte 6 instead of 12"),
    "too many sequences": (put(18, "Q", 2**60), "header says"),
    "too few boundaries": (put(26, "Q", 2), "header says 86"),
    "length": (put(34, "i", 4), "sequence 1 of 1 tokens starts at byte 6 instead of 8"),
    "negative length": (put(42, "i", -2), "sequence 2 of -2 tokens"),
    "last length": (put(42, "i", 9), "12 bytes and its index says 26"),
    "pointer": (put(54, "q", 7), "sequence 1 of 1 tokens starts at byte 7 instead of 6"),
    "first boundary": (put(70, "q", 1), "don't run from 0 to 3"),
    "last boundary": (put(86, "q", 2), "don't run from 0 to 3"),
    "unordered": (put(78, "q", 4), "don't run from 0 to 3"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_index_is_one_sentence(tmp_path: Path, name: str) -> None:
    write_by_hand(tmp_path / "z", "H", [[1, 2, 3], [4], [5, 6]], [0, 2, 3])
    path = tmp_path / "z.idx"
    assert len(path.read_bytes()) == 94
    IndexedDataset(tmp_path / "z")
    change, message = BREAKS[name]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=message) as caught:
        IndexedDataset(tmp_path / "z")
    assert "\n" not in str(caught.value) and "z." in str(caught.value)


@pytest.mark.parametrize(
    ("ending", "content", "message"),
    [
        (".bin", b"\1\0" * 5, "10 bytes and its index says 12"),
        (".bin", b"\1\0" * 7, "14 bytes and its index says 12"),
        (".bin", None, "z.bin does not exist"),
        (".idx", None, "z.idx does not exist"),
    ],
)
def test_broken_or_missing_files(tmp_path: Path, ending: str, content: bytes | None, message: str) -> None:
    write_by_hand(tmp_path / "z", "H", [[1, 2, 3], [4, 5, 6]], [0, 1, 2])
    path = tmp_path / f"z{ending}"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        IndexedDataset(tmp_path / "z")


@pytest.mark.parametrize("sequences", [[], [[], []]])
def test_a_data_set_without_tokens_is_refused(tmp_path: Path, sequences: list[list[int]]) -> None:
    write_by_hand(tmp_path / "z", "H", sequences, list(range(len(sequences) + 1)))
    with pytest.raises(DataError, match="0 tokens"):
        IndexedDataset(tmp_path / "z")


def test_a_failure_while_writing_leaves_what_was_there(tmp_path: Path) -> None:
    def write(ids: list[int], fail: bool) -> None:
        with IndexedWriter(tmp_path / "x", 100) as writer:
            writer.write(np.array(ids))
            writer.end_document()
            if fail:
                raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        write([1, 2], fail=True)
    assert list(tmp_path.iterdir()) == []
    write([3, 4, 5], fail=False)
    with pytest.raises(RuntimeError):
        write([6], fail=True)
    assert read_by_hand(tmp_path / "x")[1] == [[3, 4, 5]]
    write([7, 8], fail=False)
    assert read_by_hand(tmp_path / "x")[1] == [[7, 8]]
    assert len(list(tmp_path.iterdir())) == 2


def test_no_index_is_ever_beside_tokens_of_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with IndexedWriter(tmp_path / "x", 100) as writer:
        writer.write(np.array([1]))
        writer.end_document()
    states, flushed = [], []
    real = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, to: states.append(sorted(os.listdir(tmp_path))) or real(self, to))
    monkeypatch.setattr(indexed, "sync", lambda path: flushed.append((path.name.split(".")[2:3], len(states))))
    with IndexedWriter(tmp_path / "x", 100) as writer:
        writer.write(np.array([2]))
        writer.end_document()
    assert len(states) == 2 and not any("x.idx" in names for names in states)
    assert flushed[:2] == [(["bin"], 0), (["idx"], 0)]  # both before the first rename
    assert [renames for _, renames in flushed[2:]] == [2], "the names, after both"


def test_ids_past_the_vocabulary_are_found_with_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexed, "_CHUNK", 4)
    write_by_hand(tmp_path / "z", "i", [list(range(11)), [500, 3, 700]], [0, 1, 2])
    data = IndexedDataset(tmp_path / "z")
    data.check_vocabulary(701)
    with pytest.raises(
        DataError,
        match=r"z.bin: token 11 has id 500, outside a vocabulary of 500: ids go up to 700, use model.vocab_size=768",
    ):
        data.check_vocabulary(500)
    with pytest.raises(DataError, match="token 13 has id 700"):
        data.check_vocabulary(700)
    write_by_hand(tmp_path / "n", "i", [[1, -1]], [0, 1])
    with pytest.raises(DataError, match="token 1 has id -1"):
        IndexedDataset(tmp_path / "n").check_vocabulary(10)


def test_ids_are_read_only_when_their_type_allows_bad_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr(IndexedDataset, "check_ids", lambda self, ids, start, vocab_size: read.append(len(ids)))
    for letter, vocab_size, is_read in (("B", 256, False), ("B", 255, True), ("H", 65536, False), ("b", 1000, True)):
        write_by_hand(tmp_path / "z", letter, [[1, 2]], [0, 1])
        IndexedDataset(tmp_path / "z").check_vocabulary(vocab_size)
        assert read == [2] * is_read
        read.clear()


@pytest.mark.parametrize("ids", [[0, 3, 9], [9, 0, 0], [0, 0, -1], [3, -1, 9]])
def test_the_first_bad_id_is_named(tmp_path: Path, ids: list[int]) -> None:
    write_by_hand(tmp_path / "z", "b", [ids], [0, 1])
    at = next(i for i, token in enumerate(ids) if token in (9, -1))
    advice = "ids go up to 9, use model.vocab_size=128" if ids[at] == 9 else "an id is at least 0"
    with pytest.raises(DataError, match=f"token {at} has id {ids[at]}, outside a vocabulary of 9: {advice}"):
        IndexedDataset(tmp_path / "z").check_vocabulary(9)


@pytest.mark.parametrize("bad", [100, -1, 65536 + 5])
def test_the_writer_takes_no_id_past_its_vocabulary(tmp_path: Path, bad: int) -> None:
    with pytest.raises(DataError, match="vocabulary of 100"), IndexedWriter(tmp_path / "x", 100) as writer:
        writer.write(np.array([1, bad]))
    assert list(tmp_path.iterdir()) == []


def test_a_document_longer_than_the_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert np.iinfo(np.int32).max == indexed._MAX_SEQUENCE
    monkeypatch.setattr(indexed, "_MAX_SEQUENCE", 5)
    with pytest.raises(DataError, match="document 1 has 6 tokens"), IndexedWriter(tmp_path / "x", 100) as writer:
        for length in (5, 6):
            writer.write(np.ones(length, dtype=np.int64))
            writer.end_document()


def test_the_fingerprint_of_a_file_never_changes(tmp_path: Path) -> None:
    """Prepared data of an earlier version are found by it: path, and of each file size, time and first MB."""
    write_by_hand(tmp_path / "a", "H", [[7] * 600_000], [0, 1])
    digest = hashlib.sha256(str((tmp_path / "a.bin").resolve()).encode())
    for path in (tmp_path / "a.idx", tmp_path / "a.bin"):
        digest.update(f"{path.stat().st_size} {path.stat().st_mtime_ns} ".encode() + path.read_bytes()[: 2**20])
    assert IndexedDataset(tmp_path / "a").fingerprint == digest.hexdigest()


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    write_by_hand(tmp_path / "a", "H", [[1, 2]], [0, 1])
    first = IndexedDataset(tmp_path / "a").fingerprint
    assert IndexedDataset(tmp_path / "a").fingerprint == first
    write_by_hand(tmp_path / "a", "H", [[1, 3]], [0, 1])
    assert IndexedDataset(tmp_path / "a").fingerprint != first
    for ids in ([1, 2], [1, 3]):  # the same sizes and times, only other bytes
        write_by_hand(tmp_path / "a", "H", [ids], [0, 1])
        for ending in ("bin", "idx"):
            os.utime(tmp_path / f"a.{ending}", ns=(0, 0))
        assert IndexedDataset(tmp_path / "a").fingerprint != first
        first = IndexedDataset(tmp_path / "a").fingerprint
