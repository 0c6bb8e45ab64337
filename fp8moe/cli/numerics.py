"""`fp8moe numerics`: trains the same run in FP32, in BF16 and in FP8 with each choice of scales, and compares losses.

Weights, data, their order and the processes are the same; only `precision=` and `precision.scales=` differ. Training
losses are smoothed by an exponential mean of 0.9 (bias-corrected), as in the DeepSeek-V3 report. A pair's distance is
the largest relative difference over all steps. At a high learning rate runs part by chaos, whatever the difference at
their start, so a control is trained as well: BF16 from weights changed by 2e-3 (`init_perturbation`), which is below
what BF16 resolves. FP8 with the recipe's scales is judged by its distance to BF16: exit code 0 where that is within the
bound or within twice the control's distance to BF16, whichever is larger, 1 beyond both. Twice, since the control is
one sample of a distance that varies from one change to another. Refused: judging FP8 beside FP32 as well, from which
BF16 itself parts, by the rounding of its first weights. The runs go one after another, so that each has the whole
machine.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fp8moe.cli.command import Parser, make_parser, parse
from fp8moe.cli.launch import count_processes, launch
from fp8moe.errors import ConfigError, NonFiniteError

PRECISIONS = ("fp32", "bf16", "fp8")
SCALES = {"recipe": "fp8", "fp32": "fp8_fp32", "power_of_two": "fp8_power_of_two"}  # precision.scales -> run
PERTURBATION = 2e-3  # of the control's weights
FACTOR = 2.0  # of the control's distance that FP8 may have
RUNS = {
    "fp32": ("precision=fp32",),
    "bf16": ("precision=bf16",),
    "control": ("precision=bf16", f"init_perturbation={PERTURBATION}"),
    **{run: ("precision=fp8", f"precision.scales={scales}") for scales, run in SCALES.items()},
}
PAIRS = (
    *(("fp8", "bf16"), ("control", "bf16"), ("fp8", "fp32"), ("bf16", "fp32")),
    *(("fp8_fp32", "bf16"), ("fp8_power_of_two", "bf16")),
)
SET_HERE = (
    *("precision", "precision.mode", "precision.scales", "steps", "epochs", "run_dir", "resume", "init_perturbation"),
    *("checkpoint.at_end", "logging.summary"),
)
SMOOTHING = 0.9
ROWS = 12

DESCRIPTION = """\
Train the same run in FP32, BF16 and FP8 for N steps each, FP8 once with each choice of precision.scales, and tabulate
their smoothed training losses. A control, BF16 from weights changed by 2e-3 of themselves, shows how far runs part by
chaos alone. Distances are the largest relative difference over all steps. The exit code is 0 when FP8 with the recipe's
scales is within --bound of BF16, or within twice the control's distance to BF16 where that is more; 1 when it is beyond
both. Settings are those of `fp8moe train`.

  fp8moe numerics --steps 60 experiment=quickstart
"""


@dataclass(frozen=True)
class Comparison:
    """Smoothed losses by run, step by step, and of each pair the largest relative difference and the last."""

    smoothed: dict[str, list[float]]
    largest: dict[str, float]
    last: dict[str, float]


def smooth(losses: Sequence[float], beta: float = SMOOTHING) -> list[float]:
    """The exponential mean after each step, corrected for its start: the first value is the first loss."""
    mean, result = 0.0, []
    for step, loss in enumerate(losses, start=1):
        mean = beta * mean + (1 - beta) * loss
        result.append(mean / (1 - beta**step))
    return result


def compare(losses: Mapping[str, Sequence[float]]) -> Comparison:
    """Training losses by run, equally many of each, smoothed and compared in `PAIRS`."""
    smoothed = {name: smooth(values) for name, values in losses.items()}
    differences = {
        f"{one}/{other}": [abs(a - b) / b for a, b in zip(smoothed[one], smoothed[other], strict=True)]
        for one, other in PAIRS
    }
    return Comparison(
        smoothed,
        {pair: max(values) for pair, values in differences.items()},
        {pair: values[-1] for pair, values in differences.items()},
    )


def table(comparison: Comparison) -> str:
    """The smoothed losses at about a dozen steps, the relative differences of each pair, and a row for each scales."""
    smoothed = comparison.smoothed
    steps = len(smoothed["fp8"])
    shown = sorted({1, steps, *range(max(1, steps // ROWS), steps + 1, max(1, steps // ROWS))})
    lines = [f"{'step':>6}" + "".join(f"{name:>10}" for name in PRECISIONS) + f"{'fp8/bf16':>11}{'fp8/fp32':>11}"]
    for step in shown:
        row = {name: smoothed[name][step - 1] for name in PRECISIONS}
        lines.append(
            f"{step:>6}"
            + "".join(f"{row[name]:>10.4f}" for name in PRECISIONS)
            + "".join(f"{row['fp8'] / row[other] - 1:>+11.3%}" for other in ("bf16", "fp32"))
        )
    for one, other in PAIRS:
        if one in (*PRECISIONS, "control"):
            pair = f"{one}/{other}"
            lines.append(f"{pair:>12}: {distance(comparison, pair)}")
    lines.append("fp8 by precision.scales, last loss and distance to bf16:")
    for scales, run in SCALES.items():
        lines.append(f"{scales:>13}{smoothed[run][-1]:>10.4f}  {distance(comparison, f'{run}/bf16')}")
    return "\n".join(lines)


def distance(comparison: Comparison, pair: str) -> str:
    """How far a pair's losses are apart, in words."""
    return f"at most {comparison.largest[pair]:.3%} apart, {comparison.last[pair]:.3%} at the end"


@dataclass(frozen=True)
class Verdict:
    """FP8's distance to BF16 beside what it may be: the larger of `bound` and `factor` times the control's."""

    distance: float
    control: float
    bound: float
    factor: float = FACTOR

    @property
    def allowed(self) -> float:
        return max(self.bound, self.factor * self.control)

    @property
    def within(self) -> bool:
        return self.distance <= self.allowed

    def __str__(self) -> str:
        beside = f"the bound of {self.bound:.2%}"
        if self.allowed > self.bound:
            beside = f"{self.allowed:.3%}, {self.factor:g} times the control's distance"
        is_where = "within" if self.within else "BEYOND"
        apart = f"FP8 is at most {self.distance:.3%} from BF16 and the control {self.control:.3%}"
        return f"{apart}: FP8 is {is_where} {beside}"


def command_parser() -> Parser:
    """The parser of the command line."""
    parser = make_parser("numerics", DESCRIPTION, settings=True)
    parser.add_argument("--steps", type=int, required=True, metavar="N", help="optimizer steps of each run")
    parser.add_argument(
        "--nproc", default="auto", metavar="N", help="processes of each run (auto: one a GPU, 4 without GPUs)"
    )
    parser.add_argument(
        "--bound", type=float, default=0.01, metavar="X", help="allowed in any case: a relative difference (0.01)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="directory of the runs and numerics.json (runs/TIME-numerics)"
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Train, compare and print; returns 0 within the bound, 1 beyond it, or the exit code of a run that failed."""
    arguments = parse(command_parser(), argv)
    _check(arguments)
    num_processes = count_processes(arguments.nproc)
    out = arguments.out or Path("runs", f"{time.strftime('%Y%m%d-%H%M%S')}-numerics")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out={out} is a file and must be a directory: use a new one")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"--out={out} is not empty: use a new directory")
    losses = {}
    for number, (run, chosen) in enumerate(RUNS.items(), start=1):
        run_dir = out / run
        print(f"run {number} of {len(RUNS)}, {run}: {run_dir}", flush=True)
        settings = [*chosen, f"steps={arguments.steps}", f"run_dir={run_dir}"]
        more = ["checkpoint.at_end=false", "logging.summary=false"]
        code = launch(["train", *arguments.settings, *settings, *more], num_processes)
        if code:
            return code
        losses[run] = read_losses(run_dir / "metrics.jsonl")
    comparison = compare(losses)
    verdict = Verdict(comparison.largest["fp8/bf16"], comparison.largest["control/bf16"], arguments.bound)
    content = {
        "losses": losses,
        **asdict(comparison),
        "verdict": {**asdict(verdict), "allowed": verdict.allowed, "within": verdict.within},
        "rule": "distance <= allowed = max(bound, factor * control); distances to bf16, the largest of all steps",
        "perturbation": PERTURBATION,
    }
    (out / "numerics.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"\nsmoothed training loss, exponential mean {SMOOTHING}, {num_processes} processes\n{table(comparison)}")
    print(f"{verdict}; {out / 'numerics.json'}")
    return 0 if verdict.within else 1


def _check(arguments: argparse.Namespace) -> None:
    if arguments.steps < 1:
        raise ConfigError(f"--steps={arguments.steps} must be at least 1")
    if arguments.bound <= 0:
        raise ConfigError(f"--bound={arguments.bound} must be above 0: use 0.01 for one percent")
    for setting in arguments.settings:
        key = setting.split("=")[0]
        if key in SET_HERE:
            raise ConfigError(f"{setting} is set by this command: leave it out")


def read_losses(path: Path) -> list[float]:
    """The training loss of every step of a run. Raises NonFiniteError where a step has none."""
    losses = [json.loads(line)["loss"] for line in path.read_text(encoding="utf-8").splitlines()]
    if None in losses:
        step = losses.index(None) + 1
        raise NonFiniteError(f"{path}: the loss of step {step} is not finite: lower optimizer.schedule.peak")
    return losses
