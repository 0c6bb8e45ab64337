"""Reading a run directory: of today's runs, of older ones, of one that was killed, and of none."""

import json
import subprocess
import sys

import pytest

from fp8moe.errors import ConfigError, DataError
from fp8moe.report.run_files import read_run

STEPS = [{"step": step, "loss": 4.0 / step, "tokens": 64} for step in (1, 2, 3)]


def write(folder, **files):
    folder.mkdir(exist_ok=True, parents=True)
    for name, content in files.items():
        suffix = ".jsonl" if isinstance(content, list) else ".json"
        text = (
            "".join(f"{json.dumps(line)}\n" for line in content) if isinstance(content, list) else json.dumps(content)
        )
        (folder / f"{name}{suffix}").write_text(text)
    return folder


def test_an_old_run_directory_has_metrics_alone(tmp_path):
    run = read_run(write(tmp_path / "old", metrics=STEPS))
    assert (run.name, run.metrics, run.notes) == ("old", STEPS, ())
    assert (run.config, run.events, run.expert_load, run.ranks, run.samples, run.origin) == ({}, [], [], [], [], {})
    assert run.summary is None and run.trace is None


def test_every_file_is_read(tmp_path):
    start = {"step": 0, "kind": "start", "versions": {"torch": "2"}, "commit": "abc", "world_size": 4, "time": 1.0}
    load, ranks = [{"step": 2, "layers": {"blocks.1": [1, 2]}}], [{"step": 2, "memory_bytes": [5, 6]}]
    samples = [{"prompt": "def", "text": " read"}]
    folder = write(tmp_path / "run", metrics=STEPS, events=[start], expert_load=load, ranks=ranks)
    write(folder, samples={"samples": samples}, summary={"loss": 1.5}, trace={"traceEvents": []})
    (folder / "config.yaml").write_text("model:\n  dim: 64\nsteps: 3\n")
    run = read_run(folder)
    assert run.config == {"model": {"dim": 64}, "steps": 3} and run.summary == {"loss": 1.5}
    assert (run.events, run.expert_load, run.ranks, run.samples) == ([start], load, ranks, samples)
    assert run.origin["versions"] == {"torch": "2"} and run.origin["commit"] == "abc"
    assert run.trace == folder / "trace.json"


def test_the_origin_of_an_old_run_is_its_newest_checkpoints(tmp_path):
    folder = write(tmp_path / "run", metrics=STEPS)
    write(folder / "checkpoints" / "step-3", state={"step": 3, "versions": {"torch": "2"}, "commit": "abc"})
    assert read_run(folder).origin == {"versions": {"torch": "2"}, "commit": "abc"}


def test_half_a_last_line_is_left_out_and_said(tmp_path):
    folder = write(tmp_path / "run", metrics=STEPS)
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 4, "loss": "caf\xc3')  # cut within a character
    run = read_run(folder)
    assert run.metrics == STEPS and run.notes == ("The last line of metrics.jsonl is half a line and is left out.",)


def test_lines_that_are_no_records_are_counted(tmp_path):
    folder = write(tmp_path / "run", metrics=STEPS)
    text = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([text[2], "nan,", text[0], "7", text[1], ""]) + "\n")
    (folder / "config.yaml").write_text("steps: [1\n")
    run = read_run(folder)
    assert run.metrics == STEPS  # by step
    assert run.notes == (
        "2 lines of metrics.jsonl are no records and are left out, the first is line 2.",
        "config.yaml can't be read and is left out.",
    )


def test_what_is_no_run_is_one_sentence(tmp_path):
    write(tmp_path / "runs" / "mine", metrics=STEPS)
    with pytest.raises(ConfigError, match=r"runs/nine is not there: name a run's directory, such as .*/runs/mine$"):
        read_run(tmp_path / "runs" / "nine")
    with pytest.raises(ConfigError, match=r"metrics\.jsonl is a file: name a run's directory"):
        read_run(tmp_path / "runs" / "mine" / "metrics.jsonl")
    with pytest.raises(DataError, match=r"holds no metrics.jsonl, .*: name a run in it, such as .*/runs/mine$"):
        read_run(tmp_path / "runs")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no metrics\.jsonl, .* first step: name a run's directory, or wait"):
        read_run(tmp_path / "empty")
    write(tmp_path / "empty", metrics=[{"steps": 1}])
    with pytest.raises(DataError, match="holds no step that can be read"):
        read_run(tmp_path / "empty")


def test_no_torch_is_loaded():
    code = "import sys, fp8moe.report.run_files; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
