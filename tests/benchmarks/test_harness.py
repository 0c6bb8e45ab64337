"""The measuring itself, measured: a clock made by the test, so that every expected figure is known exactly."""

import json
import math
import subprocess
from types import SimpleNamespace

import pytest
import torch

from benchmarks import harness

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """Stands in for perf_counter; `work` makes calls that move it on by known durations and log their name."""
    state = SimpleNamespace(now=0.0, log=[])
    monkeypatch.setattr(harness.time, "perf_counter", lambda: state.now)

    def work(name, durations):
        remaining = iter(durations)

        def call():
            state.log.append(name)
            state.now += next(remaining)

        return call

    state.work = work
    return state


def test_the_median_leaves_out_warmup_and_one_slow_call(clock):
    timing = harness.measure(clock.work("a", [100, 100, 1, 2, 3, 4, 1000]), CPU, repeats=5, warmup=2)
    assert timing == harness.Timing(median=3, lower=2, upper=4, calls=5)
    assert harness.summarize([7.0]) == harness.Timing(7.0, 7.0, 7.0, 1)


def test_trials_alternate_and_their_ratio_survives_drift(clock):
    drift = [1, 10, 100, 1000]
    pair = {
        "a": clock.work("a", [5, *(2 * d for d in drift)]),
        "b": clock.work("b", [5, *(4 * d for d in drift)]),
    }
    seconds = harness.alternate(pair, CPU, trials=4, warmup=1)
    assert clock.log == ["a", "b", "a", "b", "b", "a", "a", "b", "b", "a"]
    assert seconds == {"a": [2, 20, 200, 2000], "b": [4, 40, 400, 4000]}
    assert harness.paired_ratio(seconds["a"], seconds["b"]) == 0.5


def test_refusals_name_the_numbers():
    with pytest.raises(ValueError, match="at least 2 candidates, got 1"):
        harness.alternate({"a": lambda: None}, CPU)
    with pytest.raises(ValueError, match="got 2 and 1"):
        harness.paired_ratio([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="got 0 and 5"):
        harness.measure(lambda: None, CPU, repeats=0)
    with pytest.raises(ValueError, match="got 0"):
        harness.summarize([])


def test_report_prints_a_table_and_writes_every_field(tmp_path, capsys):
    path = tmp_path / "deep" / "records.json"
    report = harness.Report(CPU, json_path=path)
    report.add("step fp8", "T4096", "time", 12.5, "ms", baseline="step bf16", ratio=2.5)
    report.add("step bf16", "T4096", "time", 5.0, "ms")
    report.finish()
    records = json.loads(path.read_text())
    fields = "name shape metric value unit baseline ratio device versions commit command date"
    assert [" ".join(record) for record in records] == [fields, fields]
    assert (records[0]["value"], records[0]["baseline"], records[0]["ratio"]) == (12.5, "step bf16", 2.5)
    assert (records[1]["baseline"], records[1]["ratio"]) == (None, None)
    assert records[0]["versions"]["torch"] == torch.__version__
    assert "thread" in records[0]["device"]
    printed = capsys.readouterr().out
    header, first, second = (line for line in printed.splitlines() if line.startswith(("name", "step")))
    assert first.index("step bf16") == header.index("baseline")
    assert second.split() == ["step", "bf16", "T4096", "time", "5", "ms"]
    assert "2 records in" in printed


def test_report_refuses_what_a_machine_cannot_read_or_compare():
    report = harness.Report(CPU)
    for value, ratio in ((math.nan, None), (1.0, math.inf)):
        with pytest.raises(ValueError, match="must be finite"):
            report.add("a", "T1", "time", value, "ms", baseline="b", ratio=ratio)
    with pytest.raises(ValueError, match="go together"):
        report.add("a", "T1", "time", 1.0, "ms", ratio=2.0)
    assert report.records == []


def test_the_commit_says_whether_the_tree_is_what_was_committed(tmp_path):
    assert harness.describe_commit(tmp_path) == "unknown"
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.invalid"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True, timeout=30, capture_output=True)
    clean = harness.describe_commit(tmp_path)
    assert len(clean) >= 7 and "-" not in clean
    (tmp_path / "new").write_text("x")
    assert harness.describe_commit(tmp_path) == f"{clean}-dirty"


def test_arguments_settle_the_device_and_quick_caps_the_repeats(capsys):
    parser = harness.make_parser("a benchmark")
    parser.add_argument("--rows", type=int, default=7)
    arguments = harness.parse_arguments(parser, ["--device", "cpu", "--quick", "--json", "x.json"])
    assert (arguments.device, arguments.repeats, arguments.warmup, arguments.rows) == (CPU, 9, 2, 7)
    with pytest.raises(SystemExit) as ended:
        harness.parse_arguments(parser, ["--repeats", "0"])
    assert ended.value.code == 2
    assert ">= 1" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_asking_for_a_missing_gpu_is_one_sentence(capsys):
    parser = harness.make_parser("a benchmark")
    assert harness.parse_arguments(parser, []).device == CPU
    with pytest.raises(SystemExit) as ended:
        harness.parse_arguments(parser, ["--device", "cuda"])
    assert ended.value.code == 2
    assert "torch sees 0: use --device cpu" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_times_scale_with_the_bytes_moved():
    device = torch.device("cuda")
    small, large = (torch.empty(size, dtype=torch.int8, device=device) for size in (2**28, 2**30))
    times = {x.numel(): harness.measure(lambda x=x: x.zero_(), device, repeats=15).median for x in (small, large)}
    assert 3.0 < times[2**30] / times[2**28] < 5.0
