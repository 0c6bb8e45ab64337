"""Prompts of a file: their ids, and one sentence on a line that can't be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fp8moe.__main__ import main
from fp8moe.errors import DataError
from fp8moe.post.distill.prompts import read_prompts
from fp8moe.post.verify.verdict import NamedVerifier

TESTED = NamedVerifier("tested", lambda text, row: True, ("tests",))


def write(folder: Path, *rows: dict[str, Any]) -> str:
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(path)


def test_an_id_is_of_the_whole_line_wherever_it_stands(tmp_path: Path) -> None:
    one, two = {"prompt": " 1+1 ", "answer": 2}, {"prompt": "1+2", "tests": ["a", "b"], "response": "3"}
    first = read_prompts(write(tmp_path, one, two))
    assert [(prompt.number, prompt.text, prompt.row) for prompt in first] == [(1, " 1+1 ", one), (2, "1+2", two)]
    again = read_prompts(write(tmp_path, two, dict(reversed(one.items())), one, one | {"answer": 3}))
    assert [prompt.id for prompt in again[:3]] == [first[1].id, first[0].id, f"{first[0].id}-2"]
    assert len({prompt.id for prompt in again}) == 4


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": " \n"}, "prompt 2 of .* is empty: give at least one character"),
        ({"prompt": "\ud800"}, "prompt 2 of .* has half of a surrogate pair"),
        ({"prompt": "x", "answer": [1]}, "has an answer that is neither text nor a number"),
        ({"prompt": "x", "answer": True}, "has an answer that is neither text nor a number"),
        ({"prompt": "x", "tests": ["a", 1]}, "has tests that are neither text nor a list of texts"),
        ({"prompt": "x", "tests": "a", "response": 1}, "has a response that is no text"),
        ({"prompt": "x"}, "prompt 2 of .* has no tests, which --verify tested needs: add it"),
    ],
)
def test_a_line_that_can_not_be_used_is_named(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    sound = {"prompt": "x", "answer": 1.5, "tests": "assert True"}
    assert len(read_prompts(write(tmp_path, sound), [TESTED])) == 1
    with pytest.raises(DataError, match=said):
        read_prompts(write(tmp_path, sound, {"tests": "a"} | row if "no tests" not in said else row), [TESTED])
    with pytest.raises(DataError, match="can't be read"):
        read_prompts(str(tmp_path / "nowhere"))


def test_an_output_that_is_a_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--endpoint", "http://localhost:1/v1", "--model", "a", "--prompts", "none", "--output", str(tmp_path)]
    assert main(["distill", "generate", *words]) == 2
    said = f"--output={tmp_path} is a directory and must be a file: use --output {tmp_path}/chats.jsonl\n"
    assert capsys.readouterr().err == f"fp8moe: {said}"
