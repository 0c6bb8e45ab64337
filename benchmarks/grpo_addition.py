"""Reinforcement learning end to end on a laptop: a model that was fine-tuned a little learns to add by GRPO.

    python -m benchmarks.grpo_addition [--folder runs/grpo_addition] [--seeds 3] [--quick] [--json FILE]

A base model of a million parameters, then a few hundred steps of `fp8moe sft` on worked additions, which leave it right
on about half of the held-out problems; from there `fp8moe grpo` with the reward `accuracy`, for each seed, and for as
many seconds further `fp8moe sft`. Accuracy is that of greedy answers to held-out problems, none of which any run has
seen. FP32 on a CPU; the three seeds differ in problems and draws.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import Report, make_parser, parse_arguments
from benchmarks.sft_addition import accuracy, command
from fp8moe.post.tasks import as_conversation, problems
from fp8moe.train.json_lines import SAMPLES, read_lines

TASK, DIGITS, COUNT, HELD_OUT = "addition", 2, 8000, 512
BASE = (
    *("model.vocab_size=320", "model.dim=128", "model.num_layers=3", "model.dense_hidden=256", "model.mtp_depth=0"),
    *("model.experts.hidden=96", "model.attention.q_lora_rank=64", "model.attention.kv_lora_rank=48"),
    *("precision=fp32", "device=cpu", "seq_len=128", "batch.sequences=16", "validation.completions=0", "report=false"),
)
SFT = (
    *("experiment=sft_tiny", "seq_len=128", "batch.sequences=32", "batch.micro_batch=32", "validation.samples=32"),
    *("model.mtp_weight=0", "optimizer.schedule.peak=4e-3", "device=cpu", "report=false", "validation.completions=0"),
)
GRPO = (
    *("seq_len=72", "data.document_mask=false", "batch.micro_batch=64", "validation.samples=64", "device=cpu"),
    *(f"grpo.task={TASK}", f"grpo.digits={DIGITS}", "grpo.train_count=6000", "grpo.max_tokens=40", "grpo.prompts=64"),
    *("grpo.samples=8", "grpo.rewards=[accuracy]", "grpo.clip_high=0.28", "grpo.kl=0", "lr_schedule=cosine"),
    *("optimizer.schedule.peak=2e-4", "optimizer.schedule.warmup_steps=4", "optimizer.beta2=0.98"),
    *("validation.every=8", "logging.every=8"),
)


def held_out(run: Path) -> tuple[float, float]:
    """(accuracy before the first step, after the last) that a run of GRPO has written."""
    before = json.loads((run / SAMPLES).read_text())["samples"][0]["accuracy"]
    found = [one["held_out_accuracy"] for one in read_lines(run / "metrics.jsonl")[0] if "held_out_accuracy" in one]
    return before, found[-1]


def main(argv: Sequence[str] | None = None) -> int:
    """Train, fine-tune, reinforce, print."""
    parser = make_parser(
        "GRPO end to end: held-out problems answered right, before and after, beside further fine-tuning"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/grpo_addition"), help="file and runs (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of GRPO (%(default)s)")
    arguments = parse_arguments(parser, argv)
    folder, quick = arguments.folder, arguments.quick
    report, count = Report(arguments.device, json_path=arguments.json), 16 if quick else HELD_OUT
    base_steps, sft_steps, steps = (2, 2, 2) if quick else (30, 300, 48)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [as_conversation(one) for one in problems(TASK, COUNT, 0, digits=DIGITS)]
    (folder / "chat.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    base, tuned, chat = folder / "base", folder / "sft", f"data.paths=[{folder / 'chat.jsonl'}]"
    command("train", *BASE, f"steps={base_steps}", f"run_dir={base}")
    seconds = command("sft", *SFT, f"init_from={base}", chat, f"steps={sft_steps}", f"run_dir={tuned}")
    report.add("sft", f"{sft_steps} steps", "training", seconds, "s")
    for seed in range(1 if quick else arguments.seeds):
        run = folder / f"grpo-{seed}"
        words = (f"init_from={tuned}", f"steps={steps}", f"seed={seed}", f"grpo.held_out_count={count}")
        took = command("grpo", *GRPO, *words, f"run_dir={run}")
        before, after = held_out(run)
        shape = f"seed {seed}, {count} problems"
        report.add("grpo", f"seed {seed}, {steps} updates", "training", took, "s")
        report.add("before", shape, "answered right", before, "share")
        report.add("grpo", shape, "answered right", after, "share")
        longer = max(1, round(sft_steps * took / seconds))
        more = folder / f"more-{seed}"
        further = (f"init_from={tuned}", chat, f"steps={longer}", f"seed={seed}", f"run_dir={more}")
        command("sft", *SFT, "optimizer.schedule.peak=8e-4", *further)
        report.add("further sft", f"{shape}, {longer} steps", "answered right", accuracy(more, count), "share")
    report.finish()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
