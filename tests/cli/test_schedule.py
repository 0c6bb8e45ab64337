"""`fp8moe schedule` from its words to its files and exit codes."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

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
    with pytest.raises(ConfigError, match="'G=1' is unknown"):
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
        ("--pp two", "argument --pp: invalid int value: 'two'"),
        ("--pp 2 --bogus", "unrecognized arguments: --bogus"),
        ("--cost F=x", "--cost F='x' is no number"),
        ("--cost F=1,B=1,W=2", "W=2.0 is more than B=1.0"),
        ("--width 0", "--width 0 must be at least 1"),
        ("--layout 2,2", "--layout is about a model's stages: add --model NAME"),
        ("--pp 2 --model tiny --layout 2,1", "layout 2,1 places 3 blocks, but the model has 4: add 1 more"),
        ("--pp 2 --model tiny parallel.layout=[1,4]", "layout 1,4 places 5 blocks, but the model has 4: take 1 away"),
        ("--pp 2 --model tiny --layout two", "--layout 'two' is no list of block counts"),
        ("--pp 8 --model tiny", "4 blocks can't fill 8 pipeline stages"),
        ("--pp 2 --model tiny --ep 3", "--ep 3 does not divide num_experts=8: use 2"),
        ("--pp 2 --model tiny --recompute norms", "--recompute 'norms' is unknown: use some of norm,mla_up,swiglu"),
        ("--pp 2 --model huge", "model=huge is not there"),
        ("--pp 2 --svg /no/such/folder/x.svg", "/no/such/folder/x.svg: No such file or directory"),
    ],
)
def test_wrong_input_is_one_sentence_and_code_2(words: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 2
    err = capsys.readouterr().err
    assert says in err and err.startswith("fp8moe schedule: ") and err.count("\n") == 1


def test_a_bare_picture_loads_no_torch() -> None:
    """It answers at once: importing torch would take longer than all else."""
    code = "import sys; from fp8moe.cli.schedule import main; main(['--pp', '2']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, timeout=60).returncode == 0
