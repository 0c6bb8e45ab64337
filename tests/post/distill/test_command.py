"""`fp8moe distill generate` as a whole: an endpoint or a run as the teacher, rejection, resuming, the table."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from fp8moe import __version__
from fp8moe.__main__ import main
from fp8moe.data.chat_rows import read_conversations
from fp8moe.post.distill.forms import SYSTEM_PROMPT
from tests.post.distill.served import Answer, Decide, chat, right, served

ROOT = Path(__file__).resolve().parents[3]
REMOTE = ("--model", "r1", "--wait", "0.01", "--tries", "2", "--workers", "2")


def write_prompts(folder: Path, count: int, **more: Any) -> Path:
    path = folder / "prompts.jsonl"
    rows = [{"prompt": f"{i}+{i + 1}", "answer": 2 * i + 1, **more} for i in range(count)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def untimed(rows: list[dict[str, Any]]) -> list[str]:
    """Rows without what differs between two runs: their times; in an order of their own."""
    for row in rows:
        row.get("provenance", {}).pop("time", None)
    return sorted(json.dumps(row, sort_keys=True) for row in rows)


def distilled(url: str, folder: Path, *options: str) -> int:
    return main(
        ["distill", "generate", "--endpoint", url, *REMOTE, "--prompts", str(folder / "prompts.jsonl"),
         "--output", str(folder / "out.jsonl"), *options]
    )  # fmt: skip


def count(table: str, name: str) -> int:
    found = re.search(rf"^ *{re.escape(name)} +([\d,]+)", table, re.MULTILINE)
    assert found is not None, table
    return int(found[1].replace(",", ""))


def sometimes_wrong(body: dict[str, Any], number: int) -> Answer:
    """By the seed: wrong, cut, too long, or right."""
    first, second = body["messages"][-1]["content"].split("+")
    kind, answer = body["seed"] % 4, int(first) + int(second)
    if kind == 0:
        return chat(f"Answer: {answer + 1}")
    if kind == 1:
        return chat(f"Answer: {answer}", "length")
    return chat(("word " * 40 if kind == 2 else "") + f"It is\nAnswer: {answer}", tokens=50 if kind == 2 else 9)


def test_rows_provenance_and_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_prompts(tmp_path, 10)
    with served(sometimes_wrong) as endpoint:
        options = ("--samples", "4", "--verify", "answer", "--verify", "length:max_tokens=20")
        assert distilled(endpoint.url, tmp_path, *options) == 0
    table = capsys.readouterr().out
    conversations = list(read_conversations(tmp_path / "out.jsonl"))
    assert [len(messages) for _, messages in conversations] == [2] * count(table, "kept"), "fp8moe sft reads them"
    kinds = [body["seed"] % 4 for body in endpoint.bodies]
    assert len(set(body["seed"] for body in endpoint.bodies)) == 40 and set(kinds) == {0, 1, 2, 3}
    assert (count(table, "prompts"), count(table, "samples"), count(table, "accepted")) == (10, 40, kinds.count(3))
    assert count(table, "rejected by answer") == kinds.count(0) and count(table, "rejected by ended") == kinds.count(1)
    assert count(table, "rejected by length:max_tokens=20") == kinds.count(2)
    rows, samples = lines(tmp_path / "out.jsonl"), lines(tmp_path / "out.samples.jsonl")
    assert len(rows) == count(table, "kept") and len(samples) == 41 and samples[0]["settings"]["model"] == "r1"
    assert count(table, "tokens of samples") == sum(one["tokens"] for one in samples[1:])
    assert [row["line"] for row in rows] == sorted(row["line"] for row in rows)
    for row in rows:
        (question, answer) = row["messages"]
        assert (question["role"], answer["role"]) == ("user", "assistant")
        assert answer["content"].endswith(f"Answer: {row['answer']}")
        made = row["provenance"]
        assert (made["teacher"], made["model"], made["version"]) == ("endpoint", "r1", __version__)
        assert (made["temperature"], made["top_p"], made["seed"], made["form"]) == (0.6, 0.95, 0, "short")
        assert any(body["seed"] == made["draw"] for body in endpoint.bodies) and made["time"].startswith("20")
        assert [one["ok"] for one in row["verdicts"].values()] == [True] * 3
    assert f"{len({row['line'] for row in rows})}" == str(10 - int(re.findall(r"; (\d+) have none", table)[0]))


def test_both_forms_and_the_original_response(tmp_path: Path) -> None:
    path = write_prompts(tmp_path, 2)
    rows = lines(path)
    rows[1]["response"] = "Three.\n#### 3"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    def decide(body: dict[str, Any], number: int) -> Answer:
        first, second = body["messages"][-1]["content"].split("+")
        return chat(f"<think>\nlet me see\n</think>\n\nAnswer: {int(first) + int(second)}")

    with served(decide) as endpoint:
        assert distilled(endpoint.url, tmp_path, "--form", "both", "--verify", "answer") == 0
    assert len(endpoint.bodies) == 3
    short, long, original, second = lines(tmp_path / "out.jsonl")
    assert [m["content"] for m in short["messages"]] == ["0+1", "Answer: 1"]
    thought = "<think>\nlet me see\n</think>\n\nAnswer: 1"
    assert [m["content"] for m in long["messages"]] == [SYSTEM_PROMPT, "0+1", thought]
    assert long["messages"][0]["role"] == "system" and long["provenance"]["form"] == "long"
    assert [m["content"] for m in original["messages"]] == ["1+2", "Three.\n#### 3"]
    assert original["provenance"]["teacher"] == "original" and "temperature" not in original["provenance"]
    assert second["messages"][0]["content"] == SYSTEM_PROMPT
    (tmp_path / "system.txt").write_text("Check it.\n")
    with served(decide) as endpoint:
        options = ("--form", "long", "--system-prompt", str(tmp_path / "system.txt"))
        assert distilled(endpoint.url, tmp_path, *options) == 2, "samples of another system prompt are there"
        assert main(["distill", "generate", "--endpoint", endpoint.url, *REMOTE, "--prompts", str(path), "--output",
                     str(tmp_path / "other.jsonl"), *options]) == 0  # fmt: skip
    assert endpoint.bodies[0]["messages"][0] == {"role": "system", "content": "Check it."}


def test_copies_are_left_out_and_the_shortest_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_prompts(tmp_path, 3)

    def decide(body: dict[str, Any], number: int) -> Answer:
        size = body["seed"] % 3
        return chat("so " * size + "it is", tokens=size + 2)

    with served(decide) as endpoint:
        assert distilled(endpoint.url, tmp_path, "--samples", "6") == 0
        every = lines(tmp_path / "out.jsonl")
        table = capsys.readouterr().out
        assert count(table, "of them copies") == 18 - len(every) > 0
        assert distilled(endpoint.url, tmp_path, "--samples", "6", "--keep", "1", "--prefer", "shortest") == 0
        assert len(endpoint.bodies) == 18, "choosing anew asks for nothing"
    kept = lines(tmp_path / "out.jsonl")
    assert [row["line"] for row in kept] == [1, 2, 3]
    for row in kept:
        assert row["tokens"] == min(one["tokens"] for one in every if one["line"] == row["line"])


def test_verifiers_that_change_or_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any, caplog: pytest.LogCaptureFixture
) -> None:
    write_prompts(tmp_path, 5)
    (tmp_path / "strict_of_a_test.py").write_text(
        "import time\ndef check(text, row):\n    if row['answer'] == 3: raise KeyError('lost')\n"
        "    if row['answer'] == 7: time.sleep(60)\n    return row['answer'] != 5\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with served(right) as endpoint:
        assert distilled(endpoint.url, tmp_path) == 0
        assert len(lines(tmp_path / "out.jsonl")) == 5
        capfd.readouterr()
        options = ("--verify", "strict_of_a_test:check", "--verify-timeout", "0.5")
        assert distilled(endpoint.url, tmp_path, *options) == 0
        assert len(endpoint.bodies) == 5, "stored samples are verified without the teacher"
    assert [row["answer"] for row in lines(tmp_path / "out.jsonl")] == [1, 9]
    table = capfd.readouterr().out
    assert count(table, "verifier failed: strict_of_a_test:check") == 2
    assert sorted(record.message for record in caplog.records) == [
        f"verifier strict_of_a_test:check failed on prompt {line}, short sample 1, which is left out: {why}"
        for line, why in ((2, "raised KeyError: 'lost'"), (4, "took longer than --verify-timeout=0.5 s"))
    ]
    assert count(table, "rejected by strict_of_a_test:check") == 1


def test_an_endpoint_that_dies_and_the_same_command_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_prompts(tmp_path, 12)
    limit = [10]

    def decide(body: dict[str, Any], number: int) -> Answer:
        return right(body, number) if number < limit[0] else (503, {}, b"")

    options = ("--samples", "2", "--verify", "answer")
    with served(decide) as endpoint:
        assert distilled(endpoint.url, tmp_path, *options) == 75
        said = capsys.readouterr().err
        kept = len(lines(tmp_path / "out.samples.jsonl")) - 1
        assert kept == 10
        said = said.splitlines()[-1]  # before it may stand requests that failed while others were answered
        assert f"gave no answer in 2 tries (HTTP 503 Service Unavailable): {kept} of 24 samples are kept in" in said
        assert len(lines(tmp_path / "out.jsonl")) == kept, "what there is can be used"
        limit[0] = 10**9
        first = len(endpoint.bodies)
        assert distilled(endpoint.url, tmp_path, *options) == 0
        assert len(endpoint.bodies) == first + 24 - kept
    whole = tmp_path / "whole"
    whole.mkdir()
    write_prompts(whole, 12)
    with served(right) as endpoint:
        assert distilled(endpoint.url, whole, *options) == 0
    assert untimed(lines(tmp_path / "out.jsonl")) == untimed(lines(whole / "out.jsonl"))
    assert untimed(lines(tmp_path / "out.samples.jsonl")) == untimed(lines(whole / "out.samples.jsonl"))


def started(url: str, folder: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "fp8moe", "distill", "generate", "--endpoint", url, *REMOTE, "--concurrency", "2"]
    command += ["--prompts", str(folder / "prompts.jsonl"), "--output", str(folder / "out.jsonl"), *options]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def test_a_kill_loses_nothing_and_repeats_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SIGKILL at the tenth request, half a line at the end of the file, then the same command."""
    write_prompts(tmp_path, 20)
    tenth, go_on = threading.Event(), threading.Event()

    def decide(body: dict[str, Any], number: int) -> Answer:
        if number == 10:
            tenth.set()
            go_on.wait(60)
        return right(body, number)

    options = ("--verify", "answer")
    with served(decide) as endpoint:
        process = started(endpoint.url, tmp_path, *options)
        assert tenth.wait(60)
        time.sleep(0.5)
        assert distilled(endpoint.url, tmp_path, *options) == 2
        assert "another fp8moe distill writes" in capsys.readouterr().err
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        assert process.stderr is not None
        process.stderr.close()
        go_on.set()
        stored = tmp_path / "out.samples.jsonl"
        before = lines(stored)[1:]
        assert len(before) >= 9 and not (tmp_path / "out.jsonl").exists()
        with stored.open("a") as file:
            file.write('{"prompt_id": "half a li')
        asked = len(endpoint.bodies)
        assert distilled(endpoint.url, tmp_path, *options) == 0
        again = {body["messages"][0]["content"] for body in endpoint.bodies[asked:]}
    after = lines(stored)[1:]
    assert after[: len(before)] == before and len(after) == 20
    assert len(again) == 20 - len(before)
    assert len(lines(tmp_path / "out.jsonl")) == 20


def test_other_settings_do_not_add_to_the_same_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_prompts(tmp_path, 2)
    with served(right) as endpoint:
        assert distilled(endpoint.url, tmp_path) == 0
        capsys.readouterr()
        assert distilled(endpoint.url, tmp_path, "--temperature", "1.0") == 2
        said = capsys.readouterr().err
        assert "temperature=0.6 and this command asks for 1.0: name another --output" in said
        (tmp_path / "out.samples.jsonl").unlink()
        assert distilled(endpoint.url, tmp_path) == 2
        assert "out.jsonl exists and" in capsys.readouterr().err
        assert len(endpoint.bodies) == 2


@pytest.mark.parametrize(
    ("text", "options", "code", "said"),
    [
        ('{"prompt": "1+1"}', ("--verify", "answer"), 3, "has no answer, which --verify answer needs"),
        ('{"prompt": "1+1"}', ("--verify", "code"), 3, "has no tests, which --verify code needs"),
        ('{"prompt": " "}', (), 3, "prompt 1 of"),
        ('{"prompt": "\\ud800"}', (), 3, "half of a surrogate pair"),
        ('{"question": "1+1"}', (), 3, "needs the keys prompt"),
        ('{"prompt": "1+1", "answer": true}', (), 3, "neither text nor a number"),
        ('{"prompt": "1+1", "tests": [1]}', (), 3, "neither text nor a list of texts"),
        ("", (), 3, "has 0 lines"),
        ('{"prompt": "1+1"}', ("--samples", "0"), 2, "--samples=0 must be from 1"),
        ('{"prompt": "1+1"}', ("--verify", "answr"), 2, "is none of answer"),
        ('{"prompt": "1+1"}', ("--verify-timeout", "0"), 2, "--verify-timeout=0.0 must be above 0 and at most 86400"),
        ('{"prompt": "1+1"}', ("--temperature", "nan"), 2, "sampling.temperature=nan"),
        ('{"prompt": "1+1"}', ("--body", "[1]"), 2, "--body must be an object"),
        ('{"prompt": "1+1"}', ("--nproc", "2"), 2, "takes no --nproc"),
        ('{"prompt": "1+1"}', ("--system-prompt", "nowhere"), 3, "nowhere can't be read"),
    ],
)
def test_bad_input_is_one_sentence(
    text: str, options: tuple[str, ...], code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.jsonl").write_text(text)
    assert distilled("http://127.0.0.1:9/v1", tmp_path, *options) == code
    shown = capsys.readouterr()
    assert said in shown.err and shown.err.count("\n") == 1 and shown.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_text_that_is_none_is_replaced(tmp_path: Path) -> None:
    """Half a surrogate pair, which JSON can spell, and the noncharacters that chat templates mark answers with."""
    write_prompts(tmp_path, 1)
    body = json.dumps(chat("a\ud800b\ufdd0c")[2]).encode()
    with served(lambda *_: (200, {}, body)) as endpoint:
        assert distilled(endpoint.url, tmp_path) == 0
    ((_, messages),) = read_conversations(tmp_path / "out.jsonl")
    assert messages[-1]["content"] == "a?b?c"


def test_nothing_accepted_is_an_error_of_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_prompts(tmp_path, 2)
    with served(lambda body, number: chat("Answer: no")) as endpoint:
        assert distilled(endpoint.url, tmp_path, "--verify", "answer") == 3
    assert "none of 2 samples was accepted" in capsys.readouterr().err


def test_the_key_is_in_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    key = "sk-hush-0123456789"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    write_prompts(tmp_path, 2)
    decide: Decide = lambda body, number: right(body, number) if number else (400, {}, {"you sent": key})  # noqa: E731
    with served(decide) as endpoint:
        assert distilled(endpoint.url, tmp_path) == 0
    assert endpoint.headers[0]["Authorization"].endswith(key)
    shown = capsys.readouterr()
    written = "".join(path.read_text() for path in tmp_path.iterdir())
    assert key not in written + shown.out + shown.err and count(shown.out, "no answer") == 1
