"""`fp8moe schedule`: its options, its files and its exit codes."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from fp8moe.__main__ import main as run
from fp8moe.cli.schedule import main, parse_costs
from fp8moe.errors import ConfigError
from fp8moe.plan.schedule_tables import published_costs


def test_prints_the_picture_and_writes_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {name: str(tmp_path / f"out.{name}") for name in ("svg", "trace", "json")}
    options = [word for name, file in files.items() for word in (f"--{name}", file)]
    assert main(["--name", "dualpipe", "--pp", "8", "--microbatches", "20", "--width", "80", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("r0 F") and lines[7].startswith("r7 f") and max(map(len, lines[:14])) <= 80
    assert any("bubble 4.8" in line for line in lines) and lines[-1] == f"wrote {files['json']}"
    record = json.loads(Path(files["json"]).read_text())
    assert record["makespan"] == pytest.approx(60.4) and record["cost"]["FB"] == 2.6
    assert max(record["bubble"]) == pytest.approx(4.8) and record["peak_activations"] == [9] * 8
    assert all("start" in action and "end" in action for rank in record["actions"] for action in rank)
    assert ElementTree.parse(files["svg"]).getroot().tag.endswith("svg")
    assert json.loads(Path(files["trace"]).read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("name", "pp", "bubble"), [("1f1b", 4, 9.0), ("zb1p", 4, 3.0), ("dualpipe", 8, 6.0), ("dualpipev", 4, 6.0)]
)
def test_the_cost_option_sets_the_costs(tmp_path: Path, name: str, pp: int, bubble: float) -> None:
    file = tmp_path / "out.json"
    words = ["--name", name, "--pp", str(pp), "--microbatches", "20", "--cost", "F=1,B=2,W=1,FB=3"]
    assert main([*words, "--json", str(file)]) == 0
    assert max(json.loads(file.read_text())["bubble"]) == bubble


def test_the_schedule_by_the_name_of_its_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["schedule", "--schedule", "zb1p", "--pp", "2"]) == 0
    assert "zb1p" in capsys.readouterr().out


def test_compare_and_the_published_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--pp", "16", "--microbatches", "120", "--cost", "deepseek-v3", "--compare", "--width", "80"]) == 0
    out = capsys.readouterr().out
    assert "19.93" in out and "-5.6%" in out
    assert [line.split()[0] for line in out.splitlines()[-4:]] == ["1f1b", "zb1p", "dualpipe", "dualpipev"]


def test_costs_as_words() -> None:
    costs = parse_costs("FB=2.5,F=1,message=0.1")
    assert (costs.forward, costs.backward, costs.weight, costs.pair, costs.message) == (1, 2, 1, 2.5, 0.1)
    assert parse_costs("F=1,B=2,W=1").pair == 3
    assert parse_costs("deepseek-v3") == published_costs()
    with pytest.raises(ConfigError, match="--cost 'G=1' is not a cost: use F=, B=, W=, FB=, message= or deepseek-v3"):
        parse_costs("G=1")


def test_a_models_stages(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--name", "dualpipe", "--pp", "2", "--model", "tiny", "--width", "80"]
    assert main([*words, "--ep", "2"]) == 0
    balanced = capsys.readouterr().out
    assert "2 stages of 4 blocks" in balanced and "parameters (1e9)" in balanced and "head + MTP" in balanced
    assert main([*words, "--layout", "1,3"]) == 0
    assert "layout 1,3" in capsys.readouterr().out
    assert main([*words, "model.num_layers=12", "--layout", "6,6"]) == 0
    assert "layout 6,6" in capsys.readouterr().out
    assert main([*words, "parallel.layout=[3,1]"]) == 0  # as a training configuration says it
    out = capsys.readouterr().out
    assert "layout 3,1" in out and "recomputed: mla_up, norm, swiglu" in out
    assert main([*words, "--recompute", ""]) == 0
    kept = capsys.readouterr().out
    assert "recomputed: nothing" in kept and _activations(kept) > _activations(balanced) > 0


def _activations(text: str) -> float:
    (row,) = [line.split() for line in text.splitlines() if line.startswith("rank 0")]
    return float(row[4])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--name dualpipe --pp 3", "pp=3 is odd: use 2 or 4"),
        (
            "--name dualpipe --pp 8 --microbatches 10",
            "at least 16 micro-batches (2 a rank), and 10 are too few: use 16",
        ),
        ("--name pipedream", "schedule=pipedream is unknown"),
        ("--pp two", "argument --pp: invalid int value: 'two'; see fp8moe schedule --help"),
        ("--pp 2 --bogus", "unrecognized arguments: --bogus"),
        ("--cost F=x", "--cost F='x' is not a number: write for example F=1.5"),
        ("--cost F=1,B=1,W=2", "W=2.0 is more than B=1.0"),
        ("--width 0", "--width 0 must be at least 1"),
        ("--layout 2,2", "--layout needs a model: add --model NAME"),
        ("--seq-len 2", "--seq-len needs a model: add --model NAME"),
        ("--recompute norms", "--recompute needs a model: add --model NAME"),
        ("--micro-batch 2", "--micro-batch needs a model: add --model NAME"),
        ("model.dim=64", "model.dim=64 needs a model: add --model NAME"),
        ("zb1p", "zb1p is no setting: write --name zb1p"),
        ("parallel.schedule=zb1p", "parallel.schedule=zb1p is no setting: write --name zb1p"),
        ("--pp 2 --model tiny --layout 2,1", "layout 2,1 places 3 blocks, but the model has 4: add 1 more"),
        ("--pp 2 --model tiny parallel.layout=[1,4]", "layout 1,4 places 5 blocks, but the model has 4: take 1 away"),
        ("--pp 2 --model tiny --layout two", "--layout 'two' is not a list of block counts: write for example 4,4,3"),
        ("--pp 8 --model tiny", "4 blocks can't fill 8 pipeline stages"),
        ("--pp 2 --model tiny --ep 3", "--ep 3 does not divide num_experts=8: use 2"),
        (
            "--pp 2 --model tiny --recompute norms",
            "--recompute 'norms' is not one of norm, mla_up, swiglu: use some of them, or '' for nothing",
        ),
        ("--pp 2 --model huge", "model=huge is not one of dsv2_236b"),
        (
            "--pp 2 --svg /no/such/folder/x.svg",
            "--svg=/no/such/folder/x.svg is in /no/such/folder, which is not there: make it, or use another file",
        ),
        ("--pp 2 --json /", "--json=/ is a directory and must be a file: use --json /schedule.json"),
    ],
)
def test_wrong_input_is_one_sentence_and_code_2(words: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["schedule", *words.split()]) == 2
    err = capsys.readouterr().err
    assert says in err and err.startswith("fp8moe: ") and err.count("\n") == 1


def test_a_picture_loads_no_torch(tmp_path: Path) -> None:
    """Importing torch would take longer than all else."""
    words = ["--pp", "2", "--compare", "--svg", str(tmp_path / "x.svg"), "--json", str(tmp_path / "x.json")]
    code = f"import sys; from fp8moe.cli.schedule import main; main({words}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, timeout=60).returncode == 0


def test_micro_batches_and_width_by_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for pp, microbatches in ((4, 20), (10, 20), (12, 24)):
        assert main(["--name", "1f1b", "--pp", str(pp), "--width", "200"]) == 0
        assert f"{pp} ranks, {pp} stages, {microbatches} micro-batches" in capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "61")
    assert main(["--pp", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()[0]) == 61


def test_colours_only_where_asked_or_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for terminal, choice, coloured in (
        *((False, "auto", False), (False, "always", True)),
        *((True, "auto", True), (True, "never", False)),
    ):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
        assert main(["--pp", "2", "--colour", choice]) == 0
        assert ("\x1b[" in capsys.readouterr().out) == coloured


def test_the_sizes_of_a_models_activations(capsys: pytest.CaptureFixture[str]) -> None:
    """Activations grow with --micro-batch and --seq-len, BF16 keeps more than FP8, experts are shared by --ep ranks."""
    words = ["--pp", "2", "--model", "tiny", "--width", "80"]

    def row(*more: str) -> tuple[float, float, str]:
        assert main([*words, *more]) == 0
        text = capsys.readouterr().out
        (cells,) = [line.split() for line in text.splitlines() if line.startswith("rank 0")]
        return float(cells[3]), float(cells[4]), text

    parameters, activations, text = row("--seq-len", "8192", "--micro-batch", "16", "model.max_seq_len=8192")
    assert "of 131072 tokens a micro-batch, fp8" in text
    assert row("--seq-len", "4096", "--micro-batch", "32", "model.max_seq_len=8192")[1] == activations
    assert row("--micro-batch", "16", "model.max_seq_len=8192")[1] == activations  # the model's longest
    assert row("--micro-batch", "32", "model.max_seq_len=8192")[1] == pytest.approx(2 * activations, rel=0.01)
    assert row("--micro-batch", "16", "--precision", "bf16", "model.max_seq_len=8192")[1] > activations
    assert row("--ep", "4")[0] < parameters
