"""DualPipeV on one GPU with a simulated all-to-all: communication that overlap hides, and the cost of SMs left to it.

Times are of whole forwards and backwards, alternated; hidden share and waits are those of the kernels of one step under
torch.profiler (`fp8moe.profile.kineto`). A pair's GEMMs leave 20 of 132 SMs free, as in the DeepSeek-V3 report (the
pipeline's `sms`). It needs torch, triton and numpy only. On a CPU a small model runs the same code.
"""

from __future__ import annotations

import argparse
from datetime import timedelta
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Report, alternate, paired_ratio, summarize
from benchmarks.local_exchange import LocalExchange, repeats_for_bandwidth
from fp8moe.data.packing import Batch
from fp8moe.layers.attention import MlaConfig
from fp8moe.layers.moe import ExpertsConfig
from fp8moe.layers.recipe import Precision, Recipe
from fp8moe.layers.router import RouterConfig
from fp8moe.model.config import ModelConfig
from fp8moe.model.loss import LossTally, LossWeights
from fp8moe.model.partition import partition
from fp8moe.model.stage import StagePasses
from fp8moe.model.transformer import Transformer, init_weights
from fp8moe.parallel.links import Links
from fp8moe.parallel.mesh import Mesh
from fp8moe.parallel.pipeline import Pipeline
from fp8moe.profile.figures import RankFigures, rank_figures, window_of
from fp8moe.profile.kineto import device_figures, profiling
from fp8moe.profile.spans import Recorder, listening, marking
from fp8moe.schedule.build import build_schedule

PEERS, FREE_SMS, MICROBATCHES = 8, 20, 16
LINKS = (None, 150e9, 50e9)  # bytes a second: one copy a message; DeepEP over NVLink at EP8, over RDMA at EP64


def model_of(device: torch.device) -> tuple[ModelConfig, int]:
    """The model, and tokens a micro-batch: four blocks of DeepSeek-V2-Lite's sizes; on a CPU a small model."""
    if device.type == "cuda":
        config = ModelConfig(
            vocab_size=32768, dim=2048, num_layers=4, num_dense_layers=0, dense_hidden=10944,
            attention=MlaConfig(num_heads=16, kv_lora_rank=512, nope_dim=128, rope_dim=64, v_dim=128),
            router=RouterConfig(topk=6, force_balance=True),
            experts=ExpertsConfig(num_experts=64, hidden=1408, num_shared=2),
        )  # fmt: skip
        return config, 4096
    config = ModelConfig(
        vocab_size=256, dim=64, num_layers=2, num_dense_layers=0, dense_hidden=64,
        attention=MlaConfig(num_heads=2, kv_lora_rank=32, nope_dim=16, rope_dim=16, v_dim=16),
        router=RouterConfig(topk=2),
        experts=ExpertsConfig(num_experts=4, hidden=32),
    )  # fmt: skip
    return config, 128


class Step:
    """Forwards and backwards of a step's micro-batches, by DualPipeV on this one rank."""

    def __init__(self, device: torch.device, *, microbatches: int = MICROBATCHES, repeats: int = 1) -> None:
        self.device, (self.config, self.tokens) = device, model_of(device)
        config, tokens = self.config, self.tokens
        self.dispatcher = LocalExchange(
            config.experts.num_experts, device, peers=min(PEERS, config.router.topk), max_rows=tokens, width=config.dim,
            repeats=repeats,
        )  # fmt: skip
        with device:
            self.model = Transformer(config, Recipe(Precision.FP8), self.dispatcher)
        init_weights(self.model, 0)
        self._schedule = build_schedule("dualpipev", 1, microbatches)
        self._stages = partition(config, 2, seq_len=tokens, folded=True)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(config.vocab_size, (microbatches, 1, tokens + 1), generator=generator).to(device)
        positions = torch.arange(tokens, device=device)[None]
        self._batches = [Batch(one[:, :-1].contiguous(), one[:, 1:].contiguous(), positions, None) for one in ids]
        self._weights = LossWeights(1 / (tokens * microbatches), 0.0, 1e-4 / microbatches)

    def __call__(self, overlap: bool, sms: int | None = None) -> Tensor:
        """-> the sums of the losses, FP64 [3]; gradients are in `main_grad`. sms: of the GEMMs of a pair."""
        self.model.main_grads.zero_()
        tally = LossTally(self.device)
        Pipeline(
            self._schedule,
            0,
            Links(Mesh(1, 1, 1, rank=0), timedelta(seconds=60)),
            StagePasses(self.model, self._stages, self._batches, self._weights, tally),
            empty=lambda: torch.empty(0),
            overlap=overlap,
            sms=sms,
        ).run()
        return tally.sums

    def figures(self, overlap: bool, sms: int | None = None) -> RankFigures:
        """Figures of one step, from its kernels; without a GPU from its spans."""
        recorder = Recorder()
        with profiling(self.device) as kernels_of, marking(self.device), listening(recorder):
            self(overlap, sms)
        work = kernels_of(recorder.spans)
        if not work:
            return rank_figures(recorder.spans, window_of([recorder.spans]))
        return device_figures(work, recorder.spans)


def measure_gpu(report: Report, arguments: argparse.Namespace) -> None:
    """For each link: messages waited for at once, overlapped, and overlapped with SMs left free."""
    device: torch.device = arguments.device
    step = Step(device, microbatches=4 if arguments.quick else MICROBATCHES)
    sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
    free = f"overlapped, GEMMs on {sms - FREE_SMS} of {sms} SMs"
    cases: dict[str, tuple[bool, int | None]] = {
        "waited at once": (False, None), "overlapped": (True, None), free: (True, sms - FREE_SMS),
    }  # fmt: skip
    row = torch.empty(step.tokens, step.config.dim, dtype=torch.bfloat16, device=device)
    num_bytes = step.dispatcher.bytes_of(row)
    for link in LINKS:
        repeats = 1 if link is None else repeats_for_bandwidth(step.dispatcher, num_bytes, link, device)
        step.dispatcher.repeats = repeats
        rate = "one copy" if link is None else f"{link / 1e9:.0f} GB/s"
        shape = f"{step.config.dim}x{step.config.num_layers} T{step.tokens}x{len(step._batches)}, {rate}"
        calls = {name: partial(step, *case) for name, case in cases.items()}
        seconds = alternate(calls, device, trials=arguments.repeats, warmup=min(2, arguments.warmup))
        for name, case in cases.items():
            baseline = None if name == "waited at once" else "waited at once"
            ratio = None if baseline is None else paired_ratio(seconds[name], seconds[baseline])
            report.add(name, shape, "forwards and backwards", summarize(seconds[name]).median * 1e3, "ms",
                       baseline=baseline, ratio=ratio)  # fmt: skip
            _report(report, name, shape, step.figures(*case))


def _report(report: Report, name: str, shape: str, figures: RankFigures) -> None:
    report.add(name, shape, "computing", figures.computing * 1e3, "ms")
    report.add(name, shape, "communication", figures.communication * 1e3, "ms")
    report.add(name, shape, "communication alone on the device", figures.exposed * 1e3, "ms")
    if figures.hidden is not None:
        report.add(name, shape, "communication hidden", figures.hidden, "of 1")
