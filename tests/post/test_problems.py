"""Problems of files: read, posed, held apart; what is wrong with one is said by its file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fp8moe.errors import DataError
from fp8moe.post.problems import Posed, chosen, open_problems, read_problems
from fp8moe.post.tasks import Problem
from fp8moe.train.config import TrainConfig
from tests.post.runs import policy_config, policy_run


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))
    return str(path)


def config_of(corpus: list[str], train: str, *settings: str) -> TrainConfig:
    return policy_config(corpus, f"data.paths=[{train}]", *settings)


def test_every_epoch_takes_every_problem_once() -> None:
    first = [number for batch in range(5) for number in chosen(10, batch, 4, 7)]
    assert sorted(first[:10]) == sorted(first[10:]) == list(range(10)) and first[:10] != first[10:]
    assert chosen(10, 2, 4, 7) == first[8:12] and chosen(10, 2, 4, 8) != first[8:12]


def test_problems_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\r\n\n{"prompt": "c\u2028d", "answer": "d", "solution": "e"}')
    found = read_problems(str(path))
    assert found == [Problem("a", "", "b"), Problem("c\u2028d", "e", "d")]
    assert [one.place for one in found] == [f"line 1 of {path}", f"line 3 of {path}"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            '{"prompt": "a"}',
            "needs the keys prompt, answer, answer being text, and has prompt: write them on every line",
        ),
        (
            '{"prompt": " \\n", "answer": "1"}',
            "has a prompt of white space alone, 0 characters: write a question of at",
        ),
        (
            '{"prompt": "a", "answer": "\\ud800"}',
            "has half of a surrogate pair in its answer, no text has one: remove it",
        ),
        ('{"prompt": "a", "answer": "1"', "is not JSON ("),
    ],
)
def test_lines_that_are_no_problems(line: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text(f'{{"prompt": "a", "answer": "b"}}\n\n{line}\n')
    with pytest.raises(DataError) as raised:
        read_problems(str(path))
    assert str(raised.value).startswith(f"line 3 of {path} {says}") and "\n" not in str(raised.value)


REFUSES = "{% if 'bad' in messages[-1].content %}{{ raise_exception('no ' + messages[-1].role) }}{% endif %}"


@pytest.mark.parametrize("at", ["train", "held"])
@pytest.mark.parametrize(
    ("template", "prompt", "says"),
    [
        (REFUSES + "{{ messages[-1].content }}", "bad", ": {template} refuses these messages (no user): change them"),
        ("{{ messages[-1].content | replace('bad', '') }}", "bad", " gives 0 tokens by {template} and needs at least"),
    ],
)  # fmt: skip
def test_a_prompt_that_can_not_be_posed_is_found_before_anything_is_sampled(
    at: str, template: str, prompt: str, says: str, corpus: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(f"{template}{{% if not add_generation_prompt %}}<|endoftext|>{{% endif %}}")
    good = [{"prompt": f"{n}?", "answer": "1"} for n in range(6)]
    bad = [*good[:2], {"prompt": prompt, "answer": "1"}]
    train = write(tmp_path / "train.jsonl", *(bad if at == "train" else good))
    held = write(tmp_path / "held.jsonl", *(bad if at == "held" else [{"prompt": "other", "answer": "1"}]))
    config = config_of(corpus, train, f"data.validation_paths=[{held}]", f"data.chat_template={file}")
    with pytest.raises(DataError) as raised:
        policy_run(config)
    path = {"train": train, "held": held}[at]
    assert str(raised.value).startswith(f"line 3 of {path}{says.format(template=file)}"), raised.value
    assert "\n" not in str(raised.value)


def test_a_prompt_format_that_leaves_nothing(corpus: list[str]) -> None:
    posed = Posed(policy_config(corpus, "grpo.prompt_format='{prompt}'"))
    assert posed.prompt(Problem("a", "", "1"))
    with pytest.raises(DataError, match=r"^the problem '' gives 0 tokens by grpo.prompt_format and needs at least 1"):
        posed.prompt(Problem("", "", "1"))


def test_what_is_held_out_is_not_trained_on(
    corpus: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": prompt, "answer": "1"} for prompt in ("a", " b\n", "c", "b", "d", "d ", "c", "A")]
    train = write(tmp_path / "train.jsonl", *rows)
    held = write(tmp_path / "held.jsonl", *({"prompt": prompt, "answer": "2"} for prompt in ("\tb", "x", "c ", "c")))
    config = config_of(corpus, train, f"data.validation_paths=[{held}]", "grpo.held_out_count=1")
    found, kept = open_problems(config)
    assert [one.prompt for one in found] == ["a", "d", "d ", "A"] and [one.prompt for one in kept] == ["\tb"]
    assert [record.message for record in caplog.records] == [
        f"2 of 3 held-out prompts are also among the 8 training problems, line 2 of {train} is the first ('b'): 4 "
        "training problems are left out and 4 remain",
        "1 of 4 training problems have the prompt of an earlier one; they are kept",
    ]
    caplog.clear()
    assert open_problems(config, is_first=False) == (found, kept) and not caplog.records
    with pytest.raises(DataError, match=r"train.jsonl give 0 problems to train on and 8 held out, at least 1 of each"):
        open_problems(config_of(corpus, train, f"data.validation_paths=[{train}]", "grpo.held_out_count=1"))


def test_a_share_holds_out_a_prompt_with_all_its_copies(corpus: list[str], tmp_path: Path) -> None:
    rows = [{"prompt": f"{space}{n}?{space}", "answer": "1"} for n in range(200) for space in ("", " ", "\n")]
    path = write(tmp_path / "all.jsonl", *rows)
    train, held = open_problems(config_of(corpus, path, "data.validation_share=0.3", "grpo.held_out_count=600"))
    assert len(train) + len(held) == 600 and len(train) % 3 == len(held) % 3 == 0 and 120 < len(held) < 240
    assert not {one.prompt.strip() for one in train} & {one.prompt.strip() for one in held}
