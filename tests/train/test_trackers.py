"""wandb, TensorBoard and the Prometheus file: the same names and figures, read back by independent readers."""

from __future__ import annotations

import math
import re
import resource
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from fp8moe.train import metrics, tensorboard_run
from fp8moe.train.metric_names import MEANING, flat
from fp8moe.train.metrics import MetricsWriter, StepReport
from fp8moe.train.prometheus import OF_THE_RUN, PrometheusFile
from fp8moe.train.trackers import LoggingConfig, is_installed
from tests.train.test_metrics import REPORT, lines

needs_tensorboard = pytest.mark.skipif(
    not is_installed("tensorboard"), reason='tensorboard is not installed: pip install "fp8moe[tensorboard]" runs this'
)
BY_KIND = {"activations": 0.0, "gradients": 0.5, "weights": 0.25}
FULL = replace(
    REPORT, mtp_loss=3.0, mfu=0.4, fp8_saturated_share=0.0, fp8_underflow_share=0.1, skipped_samples=(8, 15),
    fp8_saturated_by_kind=BY_KIND, fp8_underflow_by_kind=BY_KIND,
)  # fmt: skip
SAMPLE = re.compile(r'([a-z_:][a-z0-9_:]*)\{((?:[a-z_]+="(?:[^"\\\n]|\\[\\"n])*",?)+)\} (\S+)', re.ASCII)


def scalars(run_dir: Path) -> dict[str, dict[int, float]]:
    """The event files' series, by TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / tensorboard_run.FOLDER), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def samples(path: Path) -> dict[str, float]:
    """The samples of a text file in Prometheus's format; every line of it must be one of the three kinds."""
    found: dict[str, float] = {}
    described: dict[str, set[str]] = {}
    text = path.read_text()
    assert text.endswith("\n")
    for line in text.splitlines():
        if comment := re.fullmatch(r"# (HELP|TYPE) ([a-z0-9_]+) (.+)", line):
            kind, name, rest = comment.groups()
            assert kind not in described.setdefault(name, set()) and name not in found
            assert kind == "HELP" or rest == "gauge"
            described[name].add(kind)
        else:
            sample = SAMPLE.fullmatch(line)
            assert sample is not None, line
            assert described[sample[1]] == {"HELP", "TYPE"} and sample[1] not in found
            found[sample[1]] = float(sample[3])
    return found


def test_names_are_flat_and_say_what_they_count() -> None:
    record = {"a": 1, "b": {"c": 2.0, "d": None, "e": {"f": True}}, "g": [3, 1], "h": "text", "i": [], "j": math.nan}
    names = flat(record)
    assert math.isnan(names.pop("j"))
    assert names == {"a": 1, "b/c": 2.0, "b/e/f": 1, "g/min": 1, "g/mean": 2.0, "g/max": 3}
    assert flat(asdict(FULL)).keys() - {"skipped_samples/mean"} <= MEANING.keys()
    assert len(flat(asdict(FULL))) == len(asdict(FULL)) - 4 + len(asdict(FULL)["time"]) + 3 + 2 * 3  # four are groups


@needs_tensorboard
@pytest.mark.skipif(not is_installed("wandb"), reason='wandb is not installed: pip install "fp8moe[wandb]" runs this')
def test_all_three_get_the_same_names_and_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.train.test_wandb_run import history

    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "logs").mkdir()
    warned: list[str] = []
    config = LoggingConfig(wandb=True, tensorboard=True)
    writer = MetricsWriter(tmp_path, config, "n", {"seed": 1}, 0, warned.append)
    reports = [replace(FULL, step=1), replace(FULL, step=2, loss=math.nan, grad_norm=math.inf, skipped=True)]
    for report in reports:
        writer.write(report, {"val_loss": 4.0})
    writer.close({"steps": 2})
    assert warned == []
    wanted = {report.step: flat({**asdict(report), "val_loss": 4.0}) for report in reports}
    in_wandb, in_tensorboard, in_prometheus = history(tmp_path), scalars(tmp_path), samples(tmp_path / "metrics.prom")
    for step, values in wanted.items():
        own = {name: value for name, value in in_wandb[step].items() if not name.startswith("_")}
        assert own.keys() == values.keys() == in_tensorboard.keys()
        for name, value in values.items():
            assert same(float(own[name]), value) and same(in_tensorboard[name][step], value), name
    for name, value in wanted[2].items():
        assert same(in_prometheus["fp8moe_" + name.replace("/", "_")], value), name
    assert lines(tmp_path)[1]["loss"] is None  # JSON has no such number


def same(one: float, other: float) -> bool:
    return one == pytest.approx(other, rel=1e-6) or (math.isnan(one) and math.isnan(other))


def trained(run_dir: Path, config: LoggingConfig, steps: range, after: int, loss: float, warned: list[str]) -> Any:
    writer = MetricsWriter(run_dir, config, "n", {}, after, warned.append)
    for step in steps:
        writer.write(replace(REPORT, step=step, loss=loss), {})
    return writer


@needs_tensorboard
def test_tensorboard_has_every_step_once_after_a_resume_and_a_rollback(tmp_path: Path) -> None:
    """Killed after step 5 and resumed from 3; then rolled back from 6 to 4: what was undone is shown by nobody."""
    warned: list[str] = []
    config = LoggingConfig(tensorboard=True)
    trained(tmp_path, config, range(1, 6), 0, 1.0, warned).close()
    assert scalars(tmp_path)["loss"] == dict.fromkeys(range(1, 6), 1.0)
    second = trained(tmp_path, config, range(4, 7), 3, 2.0, warned)
    second.forget_after(4)
    second.write(replace(REPORT, step=5, loss=3.0), {})
    second.close()
    assert scalars(tmp_path)["loss"] == {1: 1.0, 2: 1.0, 3: 1.0, 4: 2.0, 5: 3.0} and warned == []
    assert [line["loss"] for line in lines(tmp_path)] == [1.0, 1.0, 1.0, 2.0, 3.0]


@needs_tensorboard
def test_a_disk_that_takes_no_more_ends_tensorboard_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorboard_run, "FLUSH_SECONDS", 0.0)
    monkeypatch.setattr("threading.excepthook", lambda args: None)  # the writer's thread ends with the error
    warned: list[str] = []
    writer = trained(tmp_path, LoggingConfig(tensorboard=True), range(1, 2), 0, 1.0, warned)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        for step in range(2, 200):
            writer.write(replace(REPORT, step=step), {})
            if any("tensorboard" in sentence for sentence in warned):
                break
            time.sleep(0.01)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    writer.write(replace(REPORT, step=200), {})
    writer.close({})
    told = [sentence for sentence in warned if "tensorboard" in sentence]
    assert len(told) == 1 and told[0].startswith("tensorboard logs no more (") and "File too large" in told[0]
    assert lines(tmp_path)[-1]["step"] == 200


def test_what_a_package_raises_at_its_start_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("no\nprotobuf.")

    monkeypatch.setattr("fp8moe.train.trackers.TensorBoardRun", fails)
    warned: list[str] = []
    trained(tmp_path, LoggingConfig(tensorboard=True), range(1, 3), 0, 1.0, warned).close()
    assert warned == ["tensorboard logs no more (no protobuf): the run goes on, metrics.jsonl has every step"]


def test_the_prometheus_file_has_the_last_step_and_the_totals(tmp_path: Path) -> None:
    path = tmp_path / "collector" / "fp8moe.prom"
    path.parent.mkdir()
    writer = MetricsWriter(tmp_path, LoggingConfig(prometheus=str(path)), 'a "b"\\\n', {}, 0)
    writer.write(REPORT, {"val_loss": 4.0}, {"steps": 9, "skipped_steps": 2, "rollbacks": 1})
    one = samples(path)
    assert one["fp8moe_val_loss"] == 4.0 and one["fp8moe_time_forward"] == 0.5 and one["fp8moe_running"] == 1
    assert (one["fp8moe_steps"], one["fp8moe_skipped_steps"], one["fp8moe_rollbacks"]) == (9, 2, 1)
    assert abs(one["fp8moe_last_step_time_seconds"] - time.time()) < 5 and "fp8moe_mfu" not in one
    assert 'run="a \\"b\\"\\\\\\n",run_dir=' in path.read_text() and one["fp8moe_run_info"] == 1
    assert "# HELP fp8moe_loss Training loss of the step, nats" in path.read_text()
    writer.note_checkpoint(1)
    writer.write(replace(REPORT, step=2, loss=-math.inf), {})
    two = samples(path)
    assert two["fp8moe_val_loss"] == 4.0 and two["fp8moe_loss"] == -math.inf and two["fp8moe_step"] == 2
    assert two["fp8moe_last_checkpoint_step"] == 1
    assert abs(two["fp8moe_last_checkpoint_time_seconds"] - time.time()) < 5
    writer.close()
    assert samples(path)["fp8moe_running"] == 0 and not (tmp_path / "metrics.prom").exists()
    assert [found.name for found in path.parent.iterdir()] == [path.name]
    assert OF_THE_RUN.keys() <= {name.removeprefix("fp8moe_") for name in two}


def test_a_reader_never_sees_half_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the file is written, the one before is there whole."""
    path = tmp_path / "metrics.prom"
    file = PrometheusFile(path, "n", tmp_path, pytest.fail)
    file.log({"loss": 1.0}, {})
    seen = []
    write_text = Path.write_text

    def watched(self: Path, *args: Any, **kwargs: Any) -> int:
        written = write_text(self, *args, **kwargs)
        seen.append(samples(path)["fp8moe_loss"])
        return written

    monkeypatch.setattr(Path, "write_text", watched)
    file.log({"loss": 2.0}, {})
    assert seen == [1.0] and samples(path)["fp8moe_loss"] == 2.0


def test_a_disk_without_room_is_told_once_and_tried_again(tmp_path: Path) -> None:
    warned: list[str] = []
    folder = tmp_path / "collector"
    writer = MetricsWriter(tmp_path, LoggingConfig(prometheus=str(folder / "a.prom")), "n", {}, 0, warned.append)
    for step in (1, 2):
        writer.write(replace(REPORT, step=step), {})
    (sentence,) = warned
    assert sentence.startswith(f"{folder / 'a.prom'} can't be written (No such file or directory): the run goes on")
    folder.mkdir()
    writer.write(replace(REPORT, step=3), {})
    assert samples(folder / "a.prom")["fp8moe_step"] == 3 and len(warned) == 1


def test_a_file_that_node_exporter_would_not_read_is_refused() -> None:
    with pytest.raises(ValueError, match=r"prometheus='?out.txt'? must end in .prom, .*: use '?out.txt.prom'?$"):
        LoggingConfig(prometheus="out.txt")


def test_the_docs_have_every_name() -> None:
    text = (Path(metrics.__file__).parents[2] / "docs" / "watching.md").read_text()
    documented = set(re.findall(r"^\| `([a-z0-9_/]+)`", text, re.MULTILINE))
    assert documented == set(MEANING) | set(OF_THE_RUN)


def test_the_reports_of_steps_are_all_named() -> None:
    fields = {name.partition("/")[0] for name in MEANING}
    assert set(StepReport.__dataclass_fields__) <= fields | {"time"}
