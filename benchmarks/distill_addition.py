"""Distillation end to end on a laptop: a model that learned to add teaches one of another size, by its own samples.

    python -m benchmarks.distill_addition [--teacher runs/sft_addition/sft] [--folder runs/distill_addition] [--seed 0]

The teacher is the run that `benchmarks.sft_addition` leaves. The student, of two layers in place of three, is trained
on the embedded corpus; then the teacher answers training problems by `fp8moe distill generate`, what `answer` accepts
is fine-tuning data, and the student is fine-tuned on it. It never sees the solutions of `fp8moe.post.tasks`.
Measured: the share of samples that are rejected, and of held-out problems answered right by the teacher and by the
student before and after.

Then the same again with the teacher's distribution in the loss, `distill.teacher=`, for each of `SETTINGS`: the same
student, data, order and number of steps, so that the loss alone differs; and, since the teacher's forwards take time,
cross entropy alone for `LONGER` times the steps, about as long.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import Report, make_parser, parse_arguments
from benchmarks.sft_addition import BASE, DIGITS, HELD_OUT, SFT, TASK, accuracy, command
from fp8moe.post.tasks import problems
from fp8moe.train.json_lines import read_lines

COUNT, SAMPLES = 1500, 2
STUDENT = ("model.num_layers=2", "model.dense_hidden=256")
LONGER = 1.6
SETTINGS = {
    "KL, the defaults": (),
    "KL, weight 0.9": ("distill.weight=0.9",),
    "KL, weight 0.9, temperature 2": ("distill.weight=0.9", "distill.temperature=2"),
}


def distill(teacher: Path, folder: Path, count: int) -> tuple[float, float]:
    """Have the teacher answer; the command's seconds, and the share of samples that are rejected."""
    prompts, taught = folder / "prompts.jsonl", folder / "taught.jsonl"
    rows = [{"prompt": one.prompt, "answer": one.answer} for one in problems(TASK, count, 1, digits=DIGITS)]
    prompts.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    sampling = ("--samples", str(SAMPLES), "--temperature", "0.8", "--max-tokens", "60", "--batch", "128")
    words = ("--prompts", str(prompts), "--output", str(taught), "--verify", "answer", "--keep", "1", *sampling)
    seconds = command("distill", "generate", str(teacher), "device=cpu", *words)
    samples = [json.loads(line) for line in (folder / "taught.samples.jsonl").read_text().splitlines()[1:]]
    rejected = sum(not all(verdict["ok"] for verdict in one["verdicts"].values()) for one in samples)
    return seconds, rejected / len(samples)


def last_kl(run: Path) -> float:
    """The KL from the teacher at the end of a run."""
    return float([row["distill_kl"] for row in read_lines(run / "metrics.jsonl")[0] if "distill_kl" in row][-1])


def main(argv: Sequence[str] | None = None) -> int:
    """Train the student, have it taught, measure, print."""
    parser = make_parser("Distillation end to end: samples rejected, held-out problems answered right before and after")
    parser.add_argument("--teacher", type=Path, default=Path("runs/sft_addition/sft"), help="a run (%(default)s)")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/distill_addition"), help="files and runs (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the student's fine-tuning (%(default)s)")
    arguments = parse_arguments(parser, argv)
    folder, quick = arguments.folder, arguments.quick
    report, held_out = Report(arguments.device, json_path=arguments.json), 10 if quick else HELD_OUT
    folder.mkdir(parents=True, exist_ok=True)
    base, student = folder / "base", folder / "student"
    steps, epochs = ("2", "0.2") if quick else ("100", "8")
    asked = f"{held_out} problems"
    report.add("teacher", asked, "answered right", accuracy(arguments.teacher, held_out), "share")
    seconds, rejected = distill(arguments.teacher, folder, COUNT // (50 if quick else 1))
    report.add("teacher", f"{SAMPLES} samples a prompt", "generating and verifying", seconds, "s")
    report.add("teacher", f"{SAMPLES} samples a prompt", "rejected", rejected, "share")
    pretraining = command("train", *BASE, *STUDENT, f"steps={steps}", f"run_dir={base}")
    report.add("student", f"{steps} steps", "pretraining", pretraining, "s")
    report.add("student", asked, "answered right before", accuracy(base, held_out), "share")
    words = (*SFT, f"init_from={base}", f"data.paths=[{folder / 'taught.jsonl'}]", f"seed={arguments.seed}")
    longer = f"{float(epochs) * LONGER:g}"
    alone = command("sft", *words, f"epochs={epochs}", f"run_dir={student}")
    report.add("student", f"{epochs} epochs", "fine-tuning", alone, "s")
    report.add("student", asked, "answered right after", accuracy(student, held_out), "share")
    for number, (name, settings) in enumerate(SETTINGS.items()):
        run = folder / f"student-kl-{number}"
        teacher = f"distill.teacher={arguments.teacher}"
        took = command("sft", *words, f"epochs={epochs}", teacher, *settings, f"run_dir={run}")
        report.add(name, f"{epochs} epochs", "fine-tuning", took, "s", baseline="student", ratio=took / alone)
        report.add(name, asked, "answered right after", accuracy(run, held_out), "share")
        report.add(name, f"{epochs} epochs", "KL of the last step", last_kl(run), "nats a token")
    run = folder / "student-longer"
    took = command("sft", *words, f"epochs={longer}", f"run_dir={run}")
    report.add("student", f"{longer} epochs", "fine-tuning", took, "s", baseline="student", ratio=took / alone)
    report.add("student", f"{asked}, {longer} epochs", "answered right after", accuracy(run, held_out), "share")
    report.finish()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
