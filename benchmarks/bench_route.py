"""Routing: bytes moved a second, beside a copy of the logits and the composition of PyTorch's operations, in one run.

    python -m benchmarks.bench_route [--quick] [--json FILE]

What is counted is what must be moved: for `route` the logits once, ids and weights once; for `route_backward` the
logits, ids and gradients of weights once and the gradient of the logits once. The ratio is the op's bytes a second over
those of a plain copy of the logits. `composed` is the same mathematics out of PyTorch's operations under autograd, with
top-k in place of the choice by keys; `router` is the whole layer, products included, forward and backward, as a time.
A name begins with the back end that ran: on a CPU that is the reference, whose figures say nothing about a GPU.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.bandwidth import size_of
from benchmarks.contest import write_beside
from benchmarks.harness import Report, alternate, make_parser, parse_arguments, summarize
from fp8moe.kernels import backend
from fp8moe.kernels.route import route, route_backward
from fp8moe.layers.linear import attach_main_grads
from fp8moe.layers.recipe import Precision, Recipe
from fp8moe.layers.router import Router, RouterConfig

SUBJECT = "Routing"
COPY, FORWARD, BACKWARD, COMPOSED, ROUTER = (
    "copy",
    "route",
    "route_backward",
    "composed, both ways",
    "router, both ways",
)
# Tokens, features, experts, top-k, groups, groups of a token: DeepSeek-V3, V2, V2-Lite; the CPU's.
SIZES = {
    "cuda": (
        *((4096, 7168, 256, 8, 8, 4), (16384, 7168, 256, 8, 8, 4)),
        *((4096, 5120, 160, 6, 8, 3), (4096, 2048, 64, 6, 1, 1)),
    ),
    "cpu": ((512, 256, 64, 6, 8, 4),),
}  # fmt: skip


def composed(logits: Tensor, bias: Tensor, counts: Tensor, c: RouterConfig) -> tuple[Tensor, Tensor]:
    """(weights, balance loss) of one sequence, followed by autograd, by some twenty operations."""
    scores, num_experts = logits.sigmoid(), logits.shape[1]
    biased = (scores.detach() + bias).unflatten(1, (c.num_groups, -1))
    strength = biased.topk(2, dim=2).values.sum(2)
    dropped = torch.ones_like(strength, dtype=torch.bool).scatter_(1, strength.topk(c.top_groups, dim=1).indices, False)
    ids = biased.masked_fill(dropped[:, :, None], float("-inf")).flatten(1).topk(c.topk, dim=1).indices
    weights = scores.gather(1, ids)
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * c.route_scale
    chosen = torch.zeros_like(scores).scatter_(1, ids, 1.0)
    counts += chosen.sum(0).to(torch.int64)
    shares = scores / (scores.sum(-1, keepdim=True) + 1e-20)
    return weights, (chosen.mean(0) * (num_experts / c.topk) * shares.mean(0)).sum()


def moves(x: Tensor, num_experts: int, config: RouterConfig) -> dict[str, tuple[Callable[[], object], int]]:
    """Name -> (call, bytes it must read and write); 0 where a time is reported."""
    with x.device:
        router = Router(x.shape[1], num_experts, config, Recipe(Precision.BF16))
        logits, counts = torch.randn(len(x), num_experts), torch.zeros(num_experts, dtype=torch.int64)
        d_weights, d_loss = torch.randn(len(x), config.topk), torch.tensor(1e-4)
    attach_main_grads(router)
    torch.nn.init.normal_(router.weight, std=0.01)
    scoring: dict[str, Any] = {"score": "sigmoid", "normalize": True, "route_scale": config.route_scale}
    choosing: dict[str, Any] = {name: getattr(config, name) for name in ("topk", "num_groups", "top_groups")}
    choosing |= {"group_score": config.group_score, "num_sequences": 1, "force_balance": False}

    def forward() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return route(logits, router.bias_E, counts, **choosing, **scoring)

    ids, weights, _, f = forward()
    leaf = logits.clone().requires_grad_()

    def both_composed() -> object:
        return torch.autograd.grad(composed(leaf, router.bias_E, counts, config), leaf, (d_weights, d_loss))

    def both_of_the_router() -> object:
        routing = router(x, 1)
        outputs = routing.topk_weights_TK, routing.balance_loss
        return torch.autograd.grad(outputs, x, (d_weights, d_loss))

    chosen = size_of(ids) + size_of(weights)
    return {
        COPY: (lambda: logits.clone(), 2 * size_of(logits)),
        FORWARD: (forward, size_of(logits) + chosen),
        BACKWARD: (
            lambda: route_backward(logits, ids, f, d_weights, d_loss, **scoring),
            2 * size_of(logits) + chosen,
        ),
        COMPOSED: (both_composed, 0),
        ROUTER: (both_of_the_router, 0),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    arguments = parse_arguments(make_parser(f"{SUBJECT}: GB/s beside a copy and PyTorch's operations"), argv)
    device = arguments.device
    report = Report(device, json_path=arguments.json)
    runs = backend.provider(FORWARD, backend.resolve(device))
    sizes = SIZES[device.type]
    for tokens, dim, num_experts, topk, num_groups, top_groups in sizes[:1] if arguments.quick else sizes:
        config = RouterConfig(topk, num_groups, top_groups, route_scale=2.5)
        x = torch.randn(tokens, dim, device=device).to(torch.bfloat16).requires_grad_()
        entries = moves(x, num_experts, config)
        calls = {name: call for name, (call, _) in entries.items()}
        seconds = alternate(calls, device, trials=arguments.repeats, warmup=arguments.warmup)
        label = f"T{tokens} D{dim} top-{topk} of {num_experts} in {num_groups} groups"
        for name, times in seconds.items():
            size = entries[name][1]
            ours = name if name in (COPY, COMPOSED) else f"{runs} {name}"
            report.add(ours, label, "time", summarize(times).median * 1e6, "us")
            if size:
                speed = [size / t / 1e9 for t in times]
                copied = [entries[COPY][1] / t / 1e9 for t in seconds[COPY]]
                ratio = None if name == COPY else statistics.median(a / b for a, b in zip(speed, copied, strict=True))
                baseline = None if ratio is None else COPY
                report.add(ours, label, "bandwidth", statistics.median(speed), "GB/s", baseline=baseline, ratio=ratio)
    report.finish()
    if arguments.json is not None:
        write_beside(report.records, arguments.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
