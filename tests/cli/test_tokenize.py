"""`fp8moe tokenize`: text in, token files out that hold exactly that text, and nothing replaced unasked."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fp8moe.cli import tokenize
from fp8moe.cli.compose import compose
from fp8moe.cli.tokenize import main
from fp8moe.data import readers
from fp8moe.data.indexed import IndexedDataset
from fp8moe.data.token_bytes import token_byte_strings
from fp8moe.data.tokenizer import load_tokenizer

TEXTS = ["first\ndocument é\r\n", "second 🙂 <|endoftext|> here", "third " * 30]


def documents_of(prefix: Path) -> list[bytes]:
    """The bytes of each document, which must end with its one end-of-text."""
    stored, strings = IndexedDataset(prefix), token_byte_strings(load_tokenizer(f"{prefix}.tokenizer.json"))
    documents = []
    for start, end in zip(stored.document_offsets, stored.document_offsets[1:], strict=False):
        ids = stored.tokens[start:end].tolist()
        assert ids[-1] == 0 and ids.count(0) == 1
        documents.append(b"".join(strings[i] for i in ids))
    return documents


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, ""]))
    (folder / "b.txt").write_bytes(b"plain\r\ntext\n" * 40)
    (folder / "c.txt").write_bytes(b"")
    return folder


EXPECTED = [text.encode() for text in TEXTS] + [b"plain\r\ntext\n" * 40]


def test_text_comes_back(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "er" / "out"
    assert main(["--input", str(inputs), "--output", str(out), "--vocab-size", "300"]) == 0
    assert documents_of(out) == EXPECTED
    assert sorted(path.name for path in out.parent.iterdir()) == ["out.bin", "out.idx", "out.tokenizer.json"]
    stored = IndexedDataset(out)
    said = capsys.readouterr().out
    ratio = sum(map(len, EXPECTED)) / (len(stored.tokens) - 4)
    assert f"4 documents from 3 files, {len(stored.tokens)} tokens, {ratio:.3f} bytes/token" in said
    assert str(stored.tokens.dtype) == "uint16"


def test_it_ends_with_the_command_that_trains_on_the_files(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command is read by the shell's rules and by hydra's, and has a larger vocabulary only where it is needed."""
    (inputs / "d.png").write_bytes(b"")
    for name in ("plain", "a b, [c]'d"):
        assert main(["--input", str(inputs), "--output", str(tmp_path / name), "--vocab-size", "300"]) == 0
        out = capsys.readouterr().out.splitlines()
        assert re.fullmatch(r"0\.0 MB of text in \d+\.\d s: \d+\.\d\d MB/s", out[1])
        assert out[2:4] == ["left out: 2 empty documents", f"passed over 1 other file: {inputs / 'd.png'}"]
        words = shlex.split(out[4].removeprefix("next: "))
        assert words[:4] == ["fp8moe", "train", "--nproc", "auto"]
        config = compose(words[4:]).config
        assert config.data.paths == (str(tmp_path / name),) and config.data.source == "indexed"
        assert config.model.vocab_size == config.data.vocab_size == 4096
    for size, expected in ((4096, 4096), (4097, 4224)):
        config = compose(shlex.split(tokenize.next_command("x", size))[4:]).config
        assert config.model.vocab_size == config.data.vocab_size == expected


def test_a_given_tokenizer_is_used_and_kept(inputs: Path, tmp_path: Path) -> None:
    assert main(["--input", str(inputs / "b.txt"), "--output", str(tmp_path / "x"), "--vocab-size", "280"]) == 0
    given = tmp_path / "x.tokenizer.json"
    assert main(["--input", str(inputs), "--output", str(tmp_path / "y"), "--tokenizer", str(given)]) == 0
    assert documents_of(tmp_path / "y") == EXPECTED
    assert (tmp_path / "y.tokenizer.json").read_bytes() == given.read_bytes()


def test_long_files_and_large_inputs_are_cut_and_sampled(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "PIECE_CHARS", 50)
    monkeypatch.setattr(tokenize, "TRAINING_SAMPLE_BYTES", 100)
    sampled = list(tokenize._training_sample([inputs / "b.txt"], "text"))
    pieces = [text for text, _ in readers.read_pieces(inputs / "b.txt")]
    assert len(pieces) > 8 and sampled == pieces[::5]  # 480 bytes are to give 100
    assert list(tokenize._training_sample([inputs / "b.txt"] * 2, "text")) == (pieces * 2)[::10]
    assert main(["--input", str(inputs), "--output", str(tmp_path / "x"), "--vocab-size", "300"]) == 0
    assert documents_of(tmp_path / "x") == EXPECTED


def test_nothing_is_replaced_unless_forced(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for ending in (".bin", ".idx", ".tokenizer.json"):
        out = tmp_path / f"x{ending[1:4]}"
        kept = Path(f"{out}{ending}")
        kept.write_text("precious")
        command = ["--input", str(inputs), "--output", str(out), "--vocab-size", "300"]
        assert main(command) == 2
        assert f"{kept} exists" in capsys.readouterr().err and kept.read_text() == "precious"
        assert list(tmp_path.glob(f"{out.name}*")) == [kept]
        assert main([*command, "--force"]) == 0 and documents_of(out) == EXPECTED


def test_a_failure_leaves_the_old_files(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "x"
    command = ["--input", str(inputs / "a.jsonl"), "--output", str(out), "--vocab-size", "300", "--force"]
    assert main(command) == 0
    before = documents_of(out)
    tokenizer = ["--tokenizer", f"{out}.tokenizer.json"]
    (inputs / "bad.txt").write_bytes(b"fine " * 99 + b"\xff")
    assert main(["--input", str(inputs), "--output", str(out), "--force", *tokenizer]) == 3
    assert documents_of(out) == before
    assert {path.name for path in tmp_path.iterdir()} == {"in", "x.bin", "x.idx", "x.tokenizer.json"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--input", "{in}/none"], 3, "none does not exist"),
        (["--input", "{in}/c.txt"], 3, "have 0 documents with text"),
        (["--input", "{in}/a.jsonl", "--text-key", "body"], 3, "no key 'body', it has text: use --text-key text\n"),
        (["--input", "{in}", "--output", "{in}/"], 2, "in/ is a folder and must be a PREFIX: use "),
        (["--input", "{in}", "--output", "{in}/x.bin"], 2, "x.bin is a PREFIX, to which .bin is added: use "),
        (["--input", "{in}", "--tokenizer", "{in}"], 3, "in is a folder and a tokenizer one file: use "),
        (["--input", "{in}", "--vocab-size", "100"], 2, "vocab_size=100 is too small"),
        (["--input", "{in}", "--tokenizer", "{in}/none.json"], 3, "none.json does not exist"),
        (["--input", "{in}", "--tokenizer", "{in}/b.txt"], 3, "is not a tokenizer.json"),
        (["--input", "{in}", "--end-of-text", "<end>"], 3, "no end-of-text token '<end>'"),
        (["--input", "{in}", "--workers", "0"], 2, "--workers 0"),
        (["--input", "{in}", "--output", "{in}/b.txt/x"], 2, "in/b.txt, which is no folder: use another --output"),
        (["--input", "{in}", "--output", "{in}/b.txt/x/y"], 2, "in/b.txt, which is no folder: use another --output"),
        (["--inputs", "{in}"], 2, "unrecognized arguments: --inputs, perhaps meant as --input; see"),
        (["--input", "/dev/null"], 3, "/dev/null is neither a file nor a folder: give"),
    ],
)
def test_bad_input_is_one_sentence(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    filled = [argument.replace("{in}", str(inputs)) for argument in arguments]
    assert main(["--output", str(tmp_path / "x"), *filled]) == code
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and said.startswith("fp8moe tokenize: ")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_table_that_is_broken_or_has_no_such_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"id": [1, 2] * 99, "body": ["one", "two"] * 99}), path)
    words = ["--input", str(path), "--output", str(tmp_path / "x"), "--workers", "1"]
    content = bytearray(path.read_bytes())
    assert main(words) == 3
    assert f"{path} has no column 'text', it has id, body: use --text-key body" in (said := capsys.readouterr().err)
    assert said.count("\n") == 1
    for broken in (content[:-9], content[: len(content) // 2], b"PAR1" + bytes(400) + b"PAR1", content[:4] + bytes(99)):
        path.write_bytes(broken)
        assert main([*words, "--text-key", "body"]) == 3
        said = capsys.readouterr().err
        assert f"{path} can't be read by pyarrow" in said and "copy it again" in said and said.count("\n") == 1
    assert [one.name for one in tmp_path.iterdir()] == ["a.parquet"], "nothing is left"


def test_workers_without_torch_in_a_process_of_its_own(inputs: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from fp8moe.cli.tokenize import main; code = main(sys.argv[1:])\n"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    options = ["--input", str(inputs), "--output", str(tmp_path / "x"), "--vocab-size", "300", "--workers", "1"]
    done = subprocess.run(
        [sys.executable, "-c", program, *options], capture_output=True, text=True, timeout=60, env=dict(os.environ)
    )
    assert done.returncode == 0 and "4 documents" in done.stdout and done.stderr == ""
    assert documents_of(tmp_path / "x") == EXPECTED


def test_a_place_that_cannot_be_written_is_known_before_a_tokenizer_is_trained(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tokenize, "train_tokenizer", None)
    assert main(["--input", str(inputs), "--output", "/proc/x"]) == 3
    assert capsys.readouterr().err.startswith("fp8moe tokenize: /proc/x can't be written (")
