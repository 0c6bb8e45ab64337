"""`fp8moe report`: what it writes and says, its mistakes in one sentence, and the report at the end of a run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from fp8moe.__main__ import main
from fp8moe.cli.report import at_end

STEPS = [
    {"step": step, "loss": 4.0 / step, "tokens": 64, "seconds": 0.5, "skipped": step == 2, "grad_norm": None}
    for step in (1, 2, 3)
]


def write_run(folder: Path, *, config: str = "", events: list[dict[str, Any]] | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(step)}\n" for step in STEPS))
    if config:
        (folder / "config.yaml").write_text(config)
    if events:
        (folder / "events.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))
    return folder


def test_a_run_and_two(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one = write_run(tmp_path / "one", config="steps: 3\nseed: 7\nname: a\nmodel: {dim: 64}\n")
    two = write_run(tmp_path / "two", config="steps: 3\nseed: 8\nname: b\nmodel: {dim: 64}\n")
    assert main(["report", str(one)]) == 0 and capsys.readouterr().out == f"report: {one / 'report.html'}\n"
    text = (one / "report.html").read_text()
    assert "3 of 3 steps" in text and "Skipped steps: 2." in text
    assert '<th scope="row">seed</th><td>7</td><td>0</td>' in text  # the default is 0
    assert '<th scope="row">model.dim</th><td>64</td><td>256</td>' in text
    assert main(["report", str(one), str(two)]) == 0 and capsys.readouterr().out == "report: report.html\n"
    text = (tmp_path / "report.html").read_text()
    differing = text.split('id="section-differences"')[1].split("</section>")[0]
    assert '<th scope="row">seed</th><td>7</td><td>8</td>' in differing and "model.dim" not in differing


def test_half_a_line_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "one")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    note = "The last line of metrics.jsonl is half a line and is left out."
    assert capsys.readouterr().out == f"{run}: {note}\nreport: {tmp_path / 'page.html'}\n"
    assert note in (tmp_path / "page.html").read_text()


def test_mistakes_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = {"kind": "start", "step": 0, "data": {"validation": "abc", "tokenizer": "t"}}
    one = write_run(tmp_path / "one", config="data: {source: stdlib}\n", events=[start])
    other = start | {"data": {"validation": "abd", "tokenizer": "t"}}
    two = write_run(tmp_path / "two", config="data: {source: stdlib}\n", events=[other])
    old = write_run(tmp_path / "old", config="data: {source: indexed, paths: [a]}\n")
    (tmp_path / "empty").mkdir()
    runs = [str(write_run(tmp_path / "many" / str(number))) for number in range(9)]
    os.mkfifo(tmp_path / "pipe")
    long = "a" * 300
    for code, arguments, sentence in (
        (2, [], "the following arguments are required: RUN_DIR; see fp8moe report --help"),
        (2, [f"{tmp_path}/three"], f"{tmp_path}/three is not there: name a run's directory, such as {two}"),
        (3, [f"{tmp_path}/empty"], f"{tmp_path}/empty holds no metrics.jsonl, which every run writes from its first "
         "step: name a run's directory, or wait until the run has done its first step"),
        (2, [f"{one}", f"{two}"], f"{one} and {two} were validated on different text, so that their losses can't be "
         "compared: make a report of each"),
        (2, [f"{one}", f"{old}"], f"{one} and {old} were validated on different text, so that their losses can't be "
         "compared: make a report of each"),
        (2, [f"{one}", f"{two}/../one"], f"{two}/../one is named twice: name each run once"),
        (2, runs, "9 runs are too many to tell apart, 8 is the most: name 8 of them"),
        (2, [f"{one}", "--out", f"{two}"], f"--out={two} is a directory and must be a file: use --out "
         f"{two}/report.html"),
        (2, [f"{one}", "--out", f"{two}/a/b"], f"--out={two}/a/b is in {two}/a, which is not there: make it, or use "
         "another file"),
        (2, [f"{one}", "--out", f"{two}/config.yaml/b"], f"--out={two}/config.yaml/b is in {two}/config.yaml, which is "
         "a file and must be a directory: use another file"),
        (2, [f"{one}", "--out", f"{tmp_path}/pipe"], f"--out={tmp_path}/pipe is there and is no ordinary file: use "
         "another one, --out report.html"),
        (3, [f"{one}", "--out", "/proc/x.html"], "/proc/x.html: No such file or directory: check the path, its access "
         "and its disk"),
        (3, [f"{one}", "--out", f"{two}/{long}"], f"{two}/{long}: File name too long: check the path, its access and "
         "its disk"),
    ):  # fmt: skip
        assert main(["report", *arguments]) == code
        assert capsys.readouterr().err == f"fp8moe: {sentence}\n"


def test_what_a_run_says_is_no_html(tmp_path: Path) -> None:
    """Text of a run's files ends neither a tag nor the script that holds the figures."""
    evil = '</script><script>alert("x")</script><b a="'
    event = {"kind": "warning", "step": 1, "text": evil}
    run = write_run(tmp_path / evil.replace("/", "-"), config=json.dumps({"name": evil, evil: evil}), events=[event])
    (run / "samples.json").write_text(json.dumps({"samples": [{"prompt": evil, "text": evil}]}))
    loads = {"step": 1, "first_step": 1, "layers": {evil: [1.0, 1.0]}}
    (run / "expert_load.jsonl").write_text(json.dumps(loads))
    assert main(["report", str(run)]) == 0
    text = (run / "report.html").read_text()
    head, plotly, _ = text.partition("plotly.js v")
    assert "<script>alert" not in text and "<b a=" not in text and head.count("</script>") == 1 and plotly


def test_a_report_that_fails_ends_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "one")
    at_end(run)
    assert capsys.readouterr().out == f"report: {run / 'report.html'}\n" and (run / "report.html").exists()
    monkeypatch.setattr("fp8moe.report.page.page", lambda *_: 1 / 0)
    at_end(run)
    words = f"the report of the run can't be written (division by zero): fp8moe report {run} tries again\n"
    assert capsys.readouterr().out == words
    (tmp_path / "none").mkdir()
    at_end(tmp_path / "none")  # before the first step
    assert capsys.readouterr().out == "" and not list((tmp_path / "none").iterdir())
