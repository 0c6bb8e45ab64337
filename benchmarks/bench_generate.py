"""Generation with a cache beside recomputing the prefix: the next token behind 256 and 2,048 tokens, tokens a second.

One sequence, weights as they are drawn, one token's logits: with a cache a forward of one token, without a forward of
the whole prefix and the head on its last place. Alternated in one process. `together`: 8 sequences, a token of each in
one forward. `of a prompt each`: completions of as many prompts, 32 tokens behind 256; `of 4 a prompt`: of a quarter of
them, each of which goes through the model once. Settings (`precision=bf16`, `model=dsv2_lite_16b`) may follow the
options; FP32 unless they say otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
from torch import Tensor

from benchmarks.harness import Report, alternate, make_parser, paired_ratio, parse_arguments, summarize
from fp8moe.cli.compose import compose
from fp8moe.generate.decode import GenerationConfig, generate
from fp8moe.generate.sampling import SamplingConfig
from fp8moe.generate.session import Session
from fp8moe.layers.dispatch import LocalDispatcher
from fp8moe.model.transformer import Transformer, init_weights
from fp8moe.parallel.mesh import build_mesh

LENGTHS = (256, 2048)
TOGETHER = 8
COMPLETIONS, SAMPLES, NEW = 16, 4, 32


def candidates(model: Transformer, length: int) -> dict[str, tuple[Callable[[], Tensor], int]]:
    """What makes the logits behind `length` tokens, and for how many sequences, by name."""
    assert model.embedding is not None and model.norm is not None and model.head is not None
    embedding, norm, head = model.embedding, model.norm, model.head
    device = embedding.weight.device
    ids_T = torch.randint(model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(0))
    prefix, on_device_T = ids_T.tolist(), ids_T.to(device)
    session = Session(model, TOGETHER, length)
    for row in range(TOGETHER):
        session.forward(session.ids([prefix[:-1]]), session.where([row], [0], length - 1))

    def recomputed() -> Tensor:
        positions = model.positions(torch.arange(length, device=device)[None])
        hidden_TD, _ = model.run_blocks(embedding(on_device_T), positions)
        return head(norm(hidden_TD[-1:]))

    def cached(count: int) -> Tensor:
        where = session.where(range(count), [length - 1] * count, 1)
        hidden_BSD = session.forward(session.ids([prefix[-1:]] * count), where)
        return session.logits(hidden_BSD[:, 0])

    one = (lambda: cached(1), 1)
    return {"recomputed": (recomputed, 1), "cached": one, "cached together": (lambda: cached(TOGETHER), TOGETHER)}


def completions(model: Transformer, length: int) -> dict[str, Callable[[], None]]:
    """What draws COMPLETIONS completions, of prompts that all differ or of SAMPLES each."""
    ids = torch.randint(model.config.vocab_size, (COMPLETIONS, length), generator=torch.Generator().manual_seed(0))
    config = GenerationConfig(NEW, COMPLETIONS, sampling=SamplingConfig(1.0))
    mesh = build_mesh(1, 1, 1, timeout=timedelta(minutes=1))

    def drawing(prompts: list[list[int]]) -> Callable[[], None]:
        def run() -> None:
            generate(model, prompts, config, mesh, num_ids=model.config.vocab_size, accept=lambda *_: False)

        return run

    shared = ids[: COMPLETIONS // SAMPLES].repeat_interleave(SAMPLES, 0)
    return {"of a prompt each": drawing(ids.tolist()), f"of {SAMPLES} a prompt": drawing(shared.tolist())}


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    """Print the table; write the records where asked."""
    parser = make_parser("Generation with a cache beside recomputing the prefix", settings=True, repeats=7, warmup=1)
    arguments = parse_arguments(parser, argv)
    report = Report(arguments.device, json_path=arguments.json)
    config = compose(["precision=fp32", "model.max_seq_len=4096", *arguments.settings]).config
    c = config.model
    with arguments.device:
        model = Transformer(c, config.recipe, LocalDispatcher(c.experts.num_experts), gradients=False)
    init_weights(model, config.seed)
    model.eval()
    for length in LENGTHS[:1] if arguments.quick else LENGTHS:
        shape = f"{config.precision.mode} D{c.dim} L{c.num_layers} E{c.experts.num_experts} T{length}"
        forwards = candidates(model, length)
        logits = {name: make()[0] for name, (make, _) in forwards.items()}
        error = float((logits["cached"] - logits["recomputed"]).float().norm() / logits["recomputed"].float().norm())
        report.add("cached", shape, "error", error, "relative")
        calls = {name: make for name, (make, _) in forwards.items()}
        seconds = alternate(calls, arguments.device, trials=arguments.repeats, warmup=arguments.warmup)
        for name, times in seconds.items():
            count = forwards[name][1]
            ratio = None if name == "recomputed" else count / paired_ratio(times, seconds["recomputed"])
            baseline = None if ratio is None else "recomputed"
            value = count / summarize(times).median
            report.add(name, shape, "throughput", value, "tokens/s", baseline=baseline, ratio=ratio)
    shape = f"{config.precision.mode} D{c.dim} L{c.num_layers} {COMPLETIONS} completions of {NEW} behind {LENGTHS[0]}"
    seconds = alternate(
        completions(model, LENGTHS[0]), arguments.device, trials=arguments.repeats, warmup=arguments.warmup
    )
    first, second = seconds
    for name, ratio in ((first, None), (second, 1 / paired_ratio(seconds[second], seconds[first]))):
        value = COMPLETIONS * NEW / summarize(seconds[name]).median
        report.add(name, shape, "throughput", value, "tokens/s", baseline=None if ratio is None else first, ratio=ratio)
    report.finish()


if __name__ == "__main__":
    main()
