"""Recomputation, saved and spent: bytes a token that one mixture block keeps for its backward, and the block's time.

One block by itself, experts loaded evenly, forward and backward under autograd, for each `recompute` alone, none and
all. Bytes are counted (`live_memory`), beside the estimate of `model.memory` for a GPU. Times are alternated in one
process against a block that recomputes SwiGLU alone, which is the default. Settings (`precision=bf16`, `model.dim=512`)
may follow the options; v_dim is set to the size of a whole head, because fused attention needs that on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.harness import Report, alternate, make_parser, paired_ratio, parse_arguments, summarize
from benchmarks.live_memory import TrackStorages
from fp8moe.cli.compose import compose
from fp8moe.layers.attention import MlaConfig
from fp8moe.layers.dispatch import LocalDispatcher
from fp8moe.layers.recipe import DEFAULT_RECOMPUTE, Recipe, Recompute
from fp8moe.model.config import ModelConfig
from fp8moe.model.memory import MicroBatch, stage_activation_bytes
from fp8moe.model.partition import Stage
from fp8moe.model.transformer import Transformer, init_weights
from fp8moe.train.config import TrainConfig

CHOICES = ("", "norm", "mla_up", "swiglu", "norm,mla_up,swiglu")


def block(config: TrainConfig, recipe: Recipe, device: torch.device) -> Callable[[], Tensor]:
    """The forward of a mixture block on one micro-batch; returns its output."""
    c = config.model
    with device:
        model = Transformer(
            c,
            recipe,
            LocalDispatcher(c.experts.num_experts),
            layers=[first_mixture(c)],
            embedding=False,
            head=False,
        )
    init_weights(model, config.seed)
    sequences = config.batch.micro_batch or 1
    positions = model.positions(torch.arange(config.seq_len, device=device).expand(sequences, -1))
    x_TD = torch.randn(sequences * config.seq_len, c.dim, device=device).to(recipe.dtype)
    x_TD.requires_grad_()
    return lambda: next(iter(model.blocks.values()))(x_TD, positions)[0]


def first_mixture(config: ModelConfig) -> int:
    """The number of the first block that is a mixture of experts."""
    return next(layer for layer in range(config.num_layers) if not config.is_dense(layer))


def kept_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes still alive after the forward; its output counts in place of its input, which the caller keeps."""
    with TrackStorages() as tracked:
        y_TD = forward()
    live = tracked.live_bytes()
    del y_TD
    return live


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table; write the records where asked."""
    parser = make_parser("Memory and time of recomputation, one mixture block", settings=True, repeats=9, warmup=1)
    arguments = parse_arguments(parser, argv)
    report = Report(arguments.device, json_path=arguments.json)
    config = compose(["batch.micro_batch=4", *arguments.settings]).config
    attention = config.model.attention
    if isinstance(attention, MlaConfig):
        attention = replace(attention, v_dim=attention.qk_dim)
    router = replace(config.model.router, force_balance=True)
    config = replace(config, model=replace(config.model, attention=attention, router=router))
    c, num_tokens = config.model, (config.batch.micro_batch or 1) * config.seq_len
    shape = f"{config.precision.mode} D{c.dim} E{c.experts.num_experts} T{num_tokens}"
    layer = first_mixture(c)
    stage = Stage(0, range(layer, layer + 1), embedding=False, head=False, mtp=False)
    recipes = {
        words: replace(config.recipe, recompute=frozenset(Recompute(name) for name in words.split(",") if name))
        for words in CHOICES
    }
    forwards = {words: block(config, recipe, arguments.device) for words, recipe in recipes.items()}
    for words, forward in forwards.items():
        forward()  # compiles kernels and fills caches
        sizes = MicroBatch(1, num_tokens, recipes[words])
        estimate = stage_activation_bytes(c, stage, sizes) / num_tokens
        kept = kept_bytes(forward) / num_tokens
        report.add(f"[{words}]", shape, "kept", kept, "B/token", baseline="estimate", ratio=kept / estimate)

    def step(forward: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            y_TD = forward()
            y_TD.backward(torch.ones_like(y_TD))

        return run

    steps = {words: step(forward) for words, forward in forwards.items()}
    seconds = alternate(steps, arguments.device, trials=arguments.repeats, warmup=arguments.warmup)
    usual = ",".join(DEFAULT_RECOMPUTE)
    for words, times in seconds.items():
        ratio = paired_ratio(times, seconds[usual])
        median = summarize(times).median * 1e3
        report.add(f"[{words}]", shape, "time", median, "ms", baseline=f"[{usual}]", ratio=ratio)
    report.finish()


if __name__ == "__main__":
    main()
