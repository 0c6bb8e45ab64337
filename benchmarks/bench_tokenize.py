"""Tokenization: MB/s of `fp8moe tokenize` beside a script of Hugging Face `datasets`, on 1 and 2 processes.

    python -m benchmarks.bench_tokenize [--megabytes 24] [--vocab-size 16384] [--quick] [--json FILE]

The text is the source code of this Python's standard library, repeated until it has that size, as JSON lines; copies
begin with their number, so that no part of the text is a repetition. Both sides take the same tokenizer, trained on
that text beforehand, and write token files: each is a process timed from its start to its end, imports included. The
ids are compared and must be the same. The peer is `datasets_tokenize`. `threads` is its single process with the
threads of the library tokenizers; without it each process has one thread, as those of fp8moe have. It is measured
where the package `datasets` is installed, which this project needs for nothing else.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.harness import ROOT, Report, alternate, make_parser, paired_ratio, parse_arguments, summarize

PROCESSES = (1, 2)
DATASETS = "datasets"


def has_datasets() -> bool:
    """Whether the package is installed."""
    return importlib.util.find_spec(DATASETS) is not None


def texts(num_bytes: int) -> Iterator[str]:
    """Documents of at least `num_bytes` bytes in all; each copy of the embedded corpus is another text."""
    from fp8moe.data.sources import read_corpus, standard_library_root

    corpus, copy = read_corpus(standard_library_root()), 0
    while num_bytes > 0:
        for document in corpus:
            text = document.text if copy == 0 else f"# copy {copy}\n{document.text}"
            yield text
            num_bytes -= len(text.encode())
            if num_bytes <= 0:
                break
        copy += 1


def write_corpus(path: Path, num_bytes: int) -> int:
    """Write JSON lines; the bytes of their text."""
    written = 0
    with path.open("w", encoding="utf-8") as handle:
        for text in texts(num_bytes):
            handle.write(json.dumps({"text": text}) + "\n")
            written += len(text.encode())
    return written


def call(words: Sequence[str], **environment: str) -> None:
    """Run a command of this Python; raise with what it said where it fails."""
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}: {done.stderr[-2000:]}")


class Bench:
    """Tokenizes one file again and again; every call writes the files of its own name anew."""

    def __init__(self, folder: Path, num_bytes: int, vocab_size: int) -> None:
        from fp8moe.data.tokenizer import save_tokenizer, train_tokenizer

        self.folder, self.source, self.tokenizer = folder, folder / "text.jsonl", folder / "tokenizer.json"
        self.num_bytes = write_corpus(self.source, num_bytes)
        save_tokenizer(train_tokenizer(texts(min(num_bytes, 8 << 20)), vocab_size), self.tokenizer)

    def output(self, name: str) -> Path:
        """The ids that a candidate wrote, uint16."""
        return self.folder / f"{name.replace(' ', '-')}.bin"

    def ours(self, name: str, processes: int) -> Callable[[], None]:
        """`fp8moe tokenize` on so many processes."""
        prefix = str(self.output(name).with_suffix(""))
        words = ["-m", "fp8moe", "tokenize", "--input", str(self.source), "--tokenizer", str(self.tokenizer)]
        words += ["--output", prefix, "--workers", str(processes), "--force"]
        return lambda: call(words, TOKENIZERS_PARALLELISM="false")

    def theirs(self, name: str, processes: int, threads: bool = False) -> Callable[[], None]:
        """The script with `datasets`; a cache of its own each time, since a second run would take the first one's."""
        parallel = "true" if threads else "false"

        def run() -> None:
            with tempfile.TemporaryDirectory(dir=self.folder) as cache:
                words = ["-m", "benchmarks.datasets_tokenize", str(self.source), str(self.tokenizer)]
                call([*words, str(self.output(name)), str(processes), cache], TOKENIZERS_PARALLELISM=parallel,
                     HF_HUB_OFFLINE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")  # fmt: skip

        return run

    def candidates(self) -> dict[str, Callable[[], None]]:
        """By name; who is left out is said."""
        found = {f"fp8moe {n}": self.ours(f"fp8moe {n}", n) for n in PROCESSES}
        if not has_datasets():
            print("datasets is not installed and left out: pip install datasets")
            return found
        found |= {f"{DATASETS} {n}": self.theirs(f"{DATASETS} {n}", n) for n in PROCESSES}
        return found | {f"{DATASETS} 1 threads": self.theirs(f"{DATASETS} 1 threads", 1, threads=True)}


def figures(seconds: Mapping[str, Sequence[float]], num_bytes: int) -> dict[str, tuple[float, str, float]]:
    """By candidate: MB/s, its baseline, and its throughput as a ratio of that one's.

    The baseline is the script on as many processes; where there is none, fp8moe on one process.
    """
    found = {}
    for name, times in seconds.items():
        peer = f"{DATASETS} {name.split()[1]}"
        baseline = peer if peer in seconds else "fp8moe 1"
        ratio = paired_ratio(seconds[baseline], times)
        found[name] = num_bytes / 1e6 / summarize(times).median, baseline, ratio
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table; write the records where asked."""
    parser = make_parser("Tokenization beside a script of datasets", repeats=3, warmup=0)
    parser.add_argument("--megabytes", type=int, default=24, help="size of the text (%(default)s)")
    parser.add_argument("--vocab-size", type=int, default=16384, help="of the tokenizer (%(default)s)")
    arguments = parse_arguments(parser, argv)
    if not 260 <= arguments.vocab_size <= 65535:
        parser.error(f"--vocab-size {arguments.vocab_size} must be at least 260 and at most 65535, for ids of 16 bits")
    if arguments.quick:
        arguments.megabytes, arguments.vocab_size, arguments.repeats = 2, 1024, 1
    cpu = torch.device("cpu")
    report, load = Report(cpu, json_path=arguments.json), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), arguments.megabytes * 1_000_000, arguments.vocab_size)
        candidates = bench.candidates()
        seconds = alternate(candidates, cpu, trials=arguments.repeats, warmup=arguments.warmup)
        ids = {bench.output(name).read_bytes() for name in candidates}
    if len(ids) != 1:
        raise RuntimeError(f"the candidates wrote {len(ids)} different token files: they must be the same")
    shape = f"{bench.num_bytes / 1e6:.1f} MB, {arguments.vocab_size} tokens"
    for name, (throughput, baseline, ratio) in figures(seconds, bench.num_bytes).items():
        own = name == baseline
        report.add(name, shape, "throughput", throughput, "MB/s", baseline=None if own else baseline,
                   ratio=None if own else ratio)  # fmt: skip
    report.finish()
    print(f"load average before the run: {load:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
