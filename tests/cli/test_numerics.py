"""The comparison's arithmetic, its exit code, and the whole command on a small run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from fp8moe.__main__ import main
from fp8moe.cli import numerics
from tests.train.runs import SMALL, write_corpus


def test_smoothing_is_an_unbiased_exponential_mean() -> None:
    assert numerics.smooth([3.0] * 5) == pytest.approx([3.0] * 5)
    assert numerics.smooth([1.0, 2.0]) == pytest.approx([1.0, (0.9 * 0.1 * 1.0 + 0.1 * 2.0) / (1 - 0.81)])


def test_the_largest_difference_decides() -> None:
    base = [5.0, 4.0, 3.0, 2.0]
    others = {"control": base, "fp8_fp32": base, "fp8_power_of_two": [5.0, 4.0, 3.0, 2.5]}
    comparison = numerics.compare({"fp32": base, "bf16": base, "fp8": [5.0, 4.2, 3.0, 2.0], **others})
    assert comparison.largest["bf16/fp32"] == 0.0
    smoothed = comparison.smoothed
    expected = max(abs(a - b) / b for a, b in zip(smoothed["fp8"], smoothed["fp32"], strict=True))
    assert comparison.largest["fp8/fp32"] == comparison.largest["fp8/bf16"] == pytest.approx(expected)
    assert expected > 0.02
    assert comparison.last["fp8/bf16"] < comparison.largest["fp8/bf16"]
    text = numerics.table(comparison)
    assert len(text.splitlines()) == 1 + 4 + 4 + 1 + 3 and "fp8/bf16: at most 2." in text
    recipe, fp32, power_of_two = text.splitlines()[-3:]
    assert recipe.split()[0] == "recipe" and "at most 2." in recipe
    assert fp32.split()[:2] == ["fp32", f"{smoothed['bf16'][-1]:.4f}"] and "at most 0.000% apart" in fp32
    assert power_of_two.split()[0] == "power_of_two" and comparison.last["fp8_power_of_two/bf16"] > 0.04
    assert f"{comparison.last['fp8_power_of_two/bf16']:.3%} at the end" in power_of_two


def test_the_command_trains_all_three_and_judges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_corpus(tmp_path)

    def in_process(arguments: Sequence[str], num_processes: int) -> int:
        assert num_processes == 1
        return main(list(arguments))

    monkeypatch.setattr(numerics, "launch", in_process)
    words = ["numerics", "--steps", "3", "--nproc", "1", *SMALL[:-1], *corpus]
    assert main([*words, "--out", str(tmp_path / "wide"), "--bound", "0.05"]) == 0
    said = capsys.readouterr().out
    assert ": FP8 is within the bound of 5.00%" in said
    before, _, rest = said.partition("\n\nsmoothed training loss")
    lines = before.splitlines()  # progress alone; what a run is and ends with is in its log
    assert [line for line in lines if line.startswith("run ")] == [
        f"run {number} of 6, {run}: {tmp_path / 'wide' / run}" for number, run in enumerate(numerics.RUNS, start=1)
    ]
    assert all(line.startswith(("run ", "step ", "validation after step 3: ")) for line in lines), before
    assert len(lines) <= 6 * 5 and "summary" not in rest
    for run in numerics.RUNS:
        log = (tmp_path / "wide" / run / "logs" / "rank-0.log").read_text()
        assert "training loss" in log and "memory of this process" in log
        assert all((tmp_path / "wide" / run / name).is_file() for name in ("summary.json", "report.html"))
    result = json.loads((tmp_path / "wide" / "numerics.json").read_text())
    assert result["verdict"]["within"] and all(len(losses) == 3 for losses in result["losses"].values())
    assert set(result["losses"]) == set(numerics.RUNS)
    assert len({tuple(losses) for losses in result["losses"].values()}) == len(numerics.RUNS), "two runs are the same"

    def copied(arguments: Sequence[str], num_processes: int) -> int:
        (run_dir,) = (Path(word.removeprefix("run_dir=")) for word in arguments if word.startswith("run_dir="))
        shutil.copytree(tmp_path / "wide" / run_dir.name, run_dir)
        return 0

    monkeypatch.setattr(numerics, "launch", copied)
    monkeypatch.setattr(numerics.Verdict, "allowed", 1e-9)
    assert main([*words, "--out", str(tmp_path / "narrow")]) == 1
    assert ": FP8 is BEYOND" in capsys.readouterr().out
    assert main([*words, "--out", str(tmp_path / "wide")]) == 2  # nothing is written over
    assert "is not empty" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main([*words, "--out", str(tmp_path / "file")]) == 2
    assert (
        capsys.readouterr().err == f"fp8moe: --out={tmp_path}/file is a file and must be a directory: use a new one\n"
    )


def test_fp8_is_judged_beside_the_control(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # FP32 and other scales are further from BF16 than anything allowed; they are not judged.
    losses = {"fp32": 3.0, "fp8": 1.0, "bf16": 1.0, "control": 1.0, "fp8_fp32": 2.0, "fp8_power_of_two": 0.5}
    given = []

    def written(arguments: Sequence[str], num_processes: int) -> int:
        (run_dir,) = (Path(word.removeprefix("run_dir=")) for word in arguments if word.startswith("run_dir="))
        run_dir.mkdir(parents=True)
        (run_dir / "metrics.jsonl").write_text(json.dumps({"loss": losses[run_dir.name]}))
        given.append([word for word in arguments if word.startswith(("precision=", "init_perturbation="))])
        return 0

    monkeypatch.setattr(numerics, "launch", written)
    for name, (fp8, control, bound, code, allowed) in {
        "bound": (1.009, 1.001, "0.01", 0, 0.01),
        "beyond": (1.011, 0.996, "0.01", 1, 0.01),
        "chaos": (0.971, 0.985, "0.01", 0, 0.03),  # three times the bound, and below twice the control's distance
        "both": (1.031, 1.015, "0.01", 1, 0.03),
        "wide": (1.031, 1.015, "0.04", 0, 0.04),
    }.items():
        losses |= {"fp8": fp8, "control": control}
        words = ["numerics", "--steps", "1", "--bound", bound, "--out", str(tmp_path / name)]
        assert main(words) == code, name
        said = capsys.readouterr().out
        assert f"FP8 is at most {abs(fp8 - 1):.3%} from BF16 and the control {abs(control - 1):.3%}: FP8 is " in said
        assert ("times the control's distance" in said) == (allowed > float(bound))
        verdict = json.loads((tmp_path / name / "numerics.json").read_text())["verdict"]
        assert verdict["within"] == (code == 0) and verdict["allowed"] == pytest.approx(allowed), name
        assert (verdict["factor"], verdict["bound"]) == (2.0, float(bound))
        assert verdict["distance"] == pytest.approx(abs(fp8 - 1)) and verdict["control"] == pytest.approx(
            abs(control - 1)
        )
    assert ["precision=bf16", "init_perturbation=0.002"] in given and given.count(["precision=bf16"]) == 5


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--steps", "0"], "--steps=0 must be at least 1"),
        (["--steps", "5", "--bound", "0"], "--bound=0.0 must be above 0"),
        *(
            (["--steps", "5", setting], f"{setting} is set by this command: leave it out")
            for setting in (
                "precision=fp8",
                "precision.mode=fp8",
                "precision.scales=fp32",
                "steps=3",
                "run_dir=x",
                "resume=auto",
                "init_perturbation=0.1",
                "epochs=2",
                "checkpoint.at_end=true",
                "logging.summary=true",
            )
        ),
        (["--steps", "5", "--nproc", "none"], "--nproc=none must be a whole number"),
    ],
)
def test_wrong_words(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["numerics", *words]) == 2
    assert says in capsys.readouterr().err


def test_a_failed_run_ends_the_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "launch", lambda arguments, num_processes: 5)
    assert main(["numerics", "--steps", "5", "--out", str(tmp_path / "a")]) == 5


def test_a_loss_that_is_not_finite_ends_the_comparison(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"loss": 1.0}\n{"loss": null}\n')
    with pytest.raises(RuntimeError, match="the loss of step 2 is not finite"):
        numerics.read_losses(tmp_path / "metrics.jsonl")
