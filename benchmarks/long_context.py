"""Context extension end to end on a laptop: train at 256, extend to 2,048 by YaRN, look for needles before and after.

    python -m benchmarks.long_context [--folder runs/long_context] [--quick] [--json FILE]

Two runs of `fp8moe train`, like those of DeepSeek-V3's recipe: one at 256 without YaRN, one at 2,048 that begins from
its weights (`init_from`) under YaRN of factor 8. The text is that of `needles`. Then, for every length and depth:
documents whose first question asks for the fact at that depth, and the share of answers that greedy generation gives
right, by exact match; for the short model as it is, under YaRN without further training, and after it. Bits per byte
are of held-out documents of 2,048 tokens, in windows of the length that a model was trained at.

FP32 on a CPU, where FP8 is emulated and slow. The model is GLM-4.5's family made small: grouped queries with biases,
all of a head rotated, routed experts. The table is printed; with --json FILE the records are written, and a picture
(SVG) beside them.
"""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from benchmarks.harness import Report, make_parser, parse_arguments
from benchmarks.needle_plot import heat_maps
from benchmarks.needles import KEYS, VOCABULARY, document, num_bytes, tokens
from fp8moe.cli.trained import trained_at
from fp8moe.data.indexed import IndexedWriter
from fp8moe.data.packing import Window, collate
from fp8moe.generate.decode import GenerationConfig, generate
from fp8moe.generate.sampling import SamplingConfig
from fp8moe.generate.scoring import token_nats
from fp8moe.model.transformer import Transformer
from fp8moe.parallel.mesh import Mesh

SHORT, LONG = 256, 2048
LENGTHS, DEPTHS = (256, 512, 1024, 2048), (0.0, 0.25, 0.5, 0.75, 1.0)
TRIALS = 20  # documents of a length and depth
YARN = f"model.attention.yarn={{factor: {LONG / SHORT}, original_max_seq_len: {SHORT}}}"
SMALL = (
    *("model=glm45_air", "precision=fp32", "device=cpu", f"model.vocab_size={VOCABULARY}", "model.dim=64"),
    *("model.num_layers=2", "model.dense_hidden=128", "model.attention.num_heads=4", "model.attention.num_kv_heads=4"),
    *("model.attention.head_dim=32", "model.attention.rope_dim=32", "model.attention.rope_theta=1000.0"),
    *("model.experts.num_experts=4", "model.experts.hidden=64", "model.router.topk=1", "model.router.route_scale=1.0"),
    *("model.mtp_depth=0", "model.init_std=0.1", "data=indexed", "optimizer.schedule.warmup_steps=20"),
    *("logging.every=20", "validation.samples=16", "validation.completions=0", "report=false"),
)
# Steps, sequences a step, learning rate, rounds of a document: of the training at 256, and of the extension.
PHASES = {SHORT: (1200, 8, 5e-3, (1, 2, 4)), LONG: (50, 4, 2e-3, (1,))}


def write_documents(prefix: Path, length: int, rounds: Sequence[int], count: int) -> None:
    """Token files of `count` documents, each as long as a sequence, so that a window is one document."""
    generator = np.random.default_rng(length)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with IndexedWriter(prefix, VOCABULARY) as writer:
        for _ in range(count):
            writer.write(tokens(document(length, generator, rounds=int(generator.choice(rounds)))))
            writer.end_document()


def train(folder: Path, length: int, steps: int, *settings: str) -> float:
    """`fp8moe train` at `length`, to folder/LENGTH; its seconds. Raises CalledProcessError where it fails."""
    _, sequences, peak, rounds = PHASES[length]
    prefix = folder / f"text-{length}"
    write_documents(prefix, length, rounds, max(steps * sequences * 11 // 10, 128))  # 1 epoch, and what is held out
    words = [
        *("fp8moe", "train", *SMALL, f"data.paths=[{prefix}]", f"data.cache_dir={folder / 'cache'}"),
        *(f"run_dir={folder / str(length)}", f"seq_len={length}", f"model.max_seq_len={length}", f"steps={steps}"),
        *(f"batch.sequences={sequences}", f"optimizer.schedule.peak={peak}", *settings),
    ]
    began = time.perf_counter()
    print(" ".join(words), flush=True)
    subprocess.run([sys.executable, "-m", *words], check=True)
    return time.perf_counter() - began


@contextmanager
def opened(run: Path, *settings: str) -> Iterator[tuple[Transformer, Mesh]]:
    """A run's model with room for all lengths, and `settings`."""
    with trained_at(str(run), [f"model.max_seq_len={LONG}", *settings], 1).loaded(averaged=False) as (model, mesh, _):
        yield model, mesh


def accuracy(model: Transformer, mesh: Mesh, length: int, depth: float, trials: int) -> float:
    """The share of needles at `depth` of documents of `length` tokens whose value the model says."""
    generator = np.random.default_rng([length, round(100 * depth)])
    prompts, answers = [], []
    for trial in range(trials):
        words = document(length, generator, needle=(KEYS[trial % len(KEYS)], depth))
        question = length - 2 * len(KEYS) + 1
        prompts.append(tokens(words[:question]).tolist())
        answers.append(tokens(words[question : question + 1]).tolist())
    config = GenerationConfig(max_tokens=1, sampling=SamplingConfig(temperature=0.0))
    found, _ = generate(model, prompts, config, mesh, num_ids=VOCABULARY, accept=lambda *_: False)
    return sum(one.ids == answer for one, answer in zip(found, answers, strict=True)) / trials


def bits_per_byte(model: Transformer, window: int, count: int) -> float:
    """Of `count` held-out documents of 2,048 tokens, each cut into windows that are scored on their own."""
    generator = np.random.default_rng(0)
    nats, in_bytes = 0.0, 0
    for _ in range(count):
        words = document(LONG + 1, generator)
        ids, first = tokens(words), np.zeros(1, dtype=np.int64)
        windows = [Window(ids[at : at + window + 1], first) for at in range(0, LONG, window)]
        nats += float(token_nats(model, collate(windows, document_mask=False)).double().sum())
        in_bytes += num_bytes(words[1:])
    return nats / math.log(2) / in_bytes


def measure(report: Report, run: Path, name: str, window: int, trials: int, *settings: str) -> None:
    """Add a model's bits per byte and its accuracy of every length and depth."""
    with opened(run, *settings) as (model, mesh):
        report.add(name, f"windows of {window}", "bits per byte", bits_per_byte(model, window, trials), "bits")
        for length in LENGTHS:
            for depth in DEPTHS:
                value = accuracy(model, mesh, length, depth, trials)
                report.add(name, f"{length} tokens, depth {depth:.0%}", "needles found", value, "share")


def needle_table(report: Report) -> str:
    """Lengths x depths of every model, and the mean of each length."""
    found = {(r.name, r.shape): r.value for r in report.records if r.metric == "needles found"}
    lines = []
    for name in dict.fromkeys(name for name, _ in found):
        lines.append(f"needles found, {name}:")
        lines.append("tokens  " + "".join(f"{f'depth {depth:.0%}':>12}" for depth in DEPTHS) + f"{'mean':>12}")
        for length in LENGTHS:
            row = [found[name, f"{length} tokens, depth {depth:.0%}"] for depth in DEPTHS]
            lines.append(f"{length:>6}  " + "".join(f"{value:>12.2f}" for value in [*row, sum(row) / len(row)]))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Train, extend, measure, print."""
    parser = make_parser("Context extension end to end: needles found and bits per byte, before and after")
    parser.add_argument("--folder", type=Path, default=Path("runs/long_context"), help="texts and runs (%(default)s)")
    arguments = parse_arguments(parser, argv)
    report = Report(arguments.device, json_path=arguments.json)
    folder, trials = arguments.folder, 2 if arguments.quick else TRIALS
    short, long = (2, 2) if arguments.quick else (PHASES[SHORT][0], PHASES[LONG][0])
    seconds = train(folder, SHORT, short)
    report.add("before", f"{short} steps at {SHORT}", "training", seconds, "s")
    measure(report, folder / str(SHORT), "before", SHORT, trials)
    measure(report, folder / str(SHORT), "YaRN, untrained", LONG, trials, YARN)
    seconds = train(folder, LONG, long, YARN, f"init_from={folder / str(SHORT)}", "lr_schedule=constant")
    report.add("after", f"{long} steps at {LONG}", "training", seconds, "s")
    measure(report, folder / str(LONG), "after", LONG, trials)
    report.finish()
    print(needle_table(report))
    if arguments.json is not None:
        arguments.json.with_suffix(".svg").write_text(heat_maps(report.records, LENGTHS, DEPTHS))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
