"""Fine-tuning end to end on a laptop: a base model of code learns to add in steps, from conversations.

    python -m benchmarks.sft_addition [--folder runs/sft_addition] [--quick] [--json FILE]

A base model of 1.9 million parameters is trained on the embedded corpus, Python's own source; then `fp8moe sft` on
problems of `fp8moe.post.tasks` with their worked solutions. Measured, before and after: the share of held-out problems,
none of which is in the file, whose answer greedy generation gives right. BF16 on a CPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import Report, make_parser, parse_arguments
from fp8moe.cli.trained import trained_at
from fp8moe.data.chat_template import open_template
from fp8moe.data.chat_tokens import encode_asked, end_of_turn
from fp8moe.generate.decode import GenerationConfig, generate
from fp8moe.post.rewards import accuracy as is_right
from fp8moe.post.tasks import as_conversation, problems

TASK, DIGITS, COUNT, HELD_OUT = "addition", 2, 3000, 500
SEQ_LEN = 128
BASE = (
    *("model.vocab_size=512", "model.dim=128", "model.num_layers=3", "model.dense_hidden=384"),
    *("model.experts.hidden=128", "model.attention.q_lora_rank=64", "precision=bf16", "device=cpu"),
    *(f"seq_len={SEQ_LEN}", "batch.sequences=16", "optimizer.schedule.peak=3e-3"),
)
SFT = ("experiment=sft_tiny", f"seq_len={SEQ_LEN}", "optimizer.schedule.peak=3e-3", "device=cpu")


def command(*words: str) -> float:
    """Run `fp8moe WORDS`; its seconds. Raises CalledProcessError where it fails."""
    began = time.perf_counter()
    print("fp8moe " + " ".join(words), flush=True)
    subprocess.run([sys.executable, "-m", "fp8moe", *words], check=True)
    return time.perf_counter() - began


def accuracy(run: Path, count: int) -> float:
    """The share of `count` held-out problems that a model answers right, asked by the template `plain`."""
    trained = trained_at(str(run), [], 1)
    vocabulary = trained.vocabulary()
    template = open_template("plain", trained.tokenizer, vocabulary.tokenizer)
    ends = vocabulary.ends | {end_of_turn(template, vocabulary.tokenizer)}
    asked = problems(TASK, count, 0, digits=DIGITS, held_out=True)
    questions = [[{"role": "user", "content": one.prompt}] for one in asked]
    prompts = [encode_asked(template, vocabulary.tokenizer, one) for one in questions]
    with trained.loaded(averaged=False) as (model, mesh, _):
        found, _ = generate(
            model,
            prompts,
            GenerationConfig(max_tokens=60, batch=128),
            mesh,
            num_ids=vocabulary.num_ids,
            accept=lambda _, token: token in ends,
        )
    texts = [vocabulary.decode([token for token in one.ids if token not in ends]) for one in found]
    return sum(is_right(one, text) for text, one in zip(texts, asked, strict=True)) / count


def main(argv: Sequence[str] | None = None) -> int:
    """Train, fine-tune, measure, print."""
    parser = make_parser("Fine-tuning end to end: held-out problems answered right, before and after")
    parser.add_argument("--folder", type=Path, default=Path("runs/sft_addition"), help="file and runs (%(default)s)")
    arguments = parse_arguments(parser, argv)
    folder, quick = arguments.folder, arguments.quick
    report, held_out = Report(arguments.device, json_path=arguments.json), 10 if quick else HELD_OUT
    folder.mkdir(parents=True, exist_ok=True)
    rows = [as_conversation(one) for one in problems(TASK, COUNT // (10 if quick else 1), 0, digits=DIGITS)]
    (folder / "chat.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    base, tuned = folder / "base", folder / "sft"
    steps, epochs = ("2", "0.2") if quick else ("100", "5")
    report.add("base", f"{steps} steps", "training", command("train", *BASE, f"steps={steps}", f"run_dir={base}"), "s")
    report.add("base", f"{held_out} problems", "answered right", accuracy(base, held_out), "share")
    words = (f"init_from={base}", f"data.paths=[{folder / 'chat.jsonl'}]", f"epochs={epochs}", f"run_dir={tuned}")
    report.add("sft", f"{epochs} epochs", "training", command("sft", *SFT, *words), "s")
    report.add("sft", f"{held_out} problems", "answered right", accuracy(tuned, held_out), "share")
    report.finish()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
