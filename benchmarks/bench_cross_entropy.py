"""Head and cross entropy, forward and backward: in chunks beside whole logits under autograd, time and peak memory.

    python -m benchmarks.bench_cross_entropy [--quick] [--json FILE]

`whole` multiplies all tokens, keeps their logits, their FP32 copy and its log-softmax, and lets autograd go back;
`chunks` is `model.head_loss`, what training runs. Both end with the loss, the gradient of the hidden states and dW in
FP32 `main_grad`. Peak memory is what a call allocates beside what was there before: on a GPU as its allocator counts,
on a CPU as bytes of storages. Then the parts that are kernels here: the pass over one chunk of logits beside a copy of
it, and the embedding's weight gradient beside `index_add_`, which on a GPU adds in no fixed order.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from benchmarks.contest import write_beside
from benchmarks.harness import Report, alternate, make_parser, paired_ratio, parse_arguments
from benchmarks.live_memory import TrackPeak
from fp8moe.kernels import backend
from fp8moe.kernels.cross_entropy import cross_entropy_with_gradient
from fp8moe.kernels.embedding import embedding_wgrad
from fp8moe.layers.linear import Linear, attach_main_grads
from fp8moe.layers.recipe import Precision, Recipe
from fp8moe.model.head_loss import chunk_tokens, head_loss
from fp8moe.model.loss import IGNORE

SUBJECT = "Head and cross entropy"
# Tokens, vocabulary, width: DeepSeek-V3's head on one and four sequences; the quickstart's.
SIZES = {"cuda": ((4096, 129_280, 7168), (16384, 129_280, 7168)), "cpu": ((4096, 4096, 256),)}
IGNORED = 11  # every so many labels one is ignored


class Problem:
    """A BF16 head with its `main_grad`, hidden states and labels."""

    def __init__(self, tokens: int, vocab_size: int, dim: int, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        with device:
            model = nn.Module()
            model.head = Linear(dim, vocab_size, Recipe(Precision.BF16))
            self.x_TD = torch.randn(tokens, dim, generator=generator, dtype=torch.bfloat16)
            self.labels_T = torch.randint(vocab_size, (tokens,), generator=generator)
            self.labels_T[::IGNORED] = IGNORE
            self.weight = torch.tensor(1.0 / tokens)
        self.head = model.head
        nn.init.normal_(self.head.weight, 0, dim**-0.5, generator=generator)
        attach_main_grads(model)

    def whole(self) -> object:
        x_TD = self.x_TD.detach().requires_grad_()
        logits = self.head(x_TD).float()
        loss = nn.functional.cross_entropy(logits, self.labels_T, ignore_index=IGNORE, reduction="sum")
        loss.backward(self.weight)
        return loss.detach(), x_TD.grad

    def chunks(self) -> object:
        return head_loss(self.head, self.x_TD, self.labels_T, self.weight)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most that one call allocates at once."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    with TrackPeak() as peak:
        call()
    return peak.most


def compare(report: Report, problem: Problem, label: str, device: torch.device, trials: int, warmup: int) -> None:
    """Time and peak memory of both ways."""
    calls = {"whole": problem.whole, "chunks": problem.chunks}
    peaks = {name: peak_bytes(call, device) / 1e9 for name, call in calls.items()}
    add_times(report, alternate(calls, device, trials=trials, warmup=warmup), label, "whole")
    report.add("whole", label, "peak memory", peaks["whole"], "GB")
    report.add(
        "chunks", label, "peak memory", peaks["chunks"], "GB", baseline="whole", ratio=peaks["chunks"] / peaks["whole"]
    )


def add_times(report: Report, seconds: Mapping[str, list[float]], label: str, baseline: str) -> None:
    for name, times in seconds.items():
        beside = None if name == baseline else baseline
        ratio = paired_ratio(times, seconds[baseline]) if beside else None
        report.add(name, label, "time", statistics.median(times) * 1e3, "ms", baseline=beside, ratio=ratio)


def compare_kernels(report: Report, problem: Problem, device: torch.device, trials: int, warmup: int) -> None:
    """The pass over a chunk's logits beside their copy, the embedding's gradient beside `index_add_`."""
    x_TD, labels_T, vocab_size = problem.x_TD, problem.labels_T, problem.head.weight.shape[0]
    size = chunk_tokens(len(x_TD), vocab_size, x_TD.dtype, device)
    logits_CV = problem.head.fprop(x_TD[:size]).detach()
    losses_C, labels_C = torch.empty(len(logits_CV), device=device), labels_T[:size]
    runs = backend.provider("cross_entropy", backend.resolve(device))
    passes = {
        "copy": lambda: logits_CV.clone(),
        f"{runs} cross_entropy_with_gradient": lambda: cross_entropy_with_gradient(
            logits_CV, labels_C, problem.weight, losses_C
        ),
    }
    label = f"C{len(logits_CV)} V{vocab_size}"
    add_times(report, alternate(passes, device, trials=trials, warmup=warmup), label, "copy")
    main_grad: Tensor = problem.head.weight.main_grad  # type: ignore[attr-defined]
    ids_T = labels_T.clamp(min=0)  # the ignored ones make a frequent token
    sums = {
        "index_add_": lambda: main_grad.index_add_(0, ids_T, x_TD.float()),
        f"{runs} embedding_wgrad": lambda: embedding_wgrad(x_TD, ids_T, main_grad),
    }
    label = f"T{len(x_TD)} V{vocab_size} D{x_TD.shape[1]}"
    add_times(report, alternate(sums, device, trials=trials, warmup=warmup), label, "index_add_")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    arguments = parse_arguments(make_parser(f"{SUBJECT}: time and peak memory, in chunks and whole"), argv)
    device = arguments.device
    report = Report(device, json_path=arguments.json)
    sizes = SIZES[device.type]
    for tokens, vocab_size, dim in sizes[:1] if arguments.quick else sizes:
        problem = Problem(tokens, vocab_size, dim, device)
        label = f"T{tokens} V{vocab_size} D{dim}"
        compare(report, problem, label, device, arguments.repeats, arguments.warmup)
        compare_kernels(report, problem, device, arguments.repeats, arguments.warmup)
    report.finish()
    if arguments.json is not None:
        write_beside(report.records, arguments.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
