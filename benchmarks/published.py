"""PREDICTION of a step's speed on paper beside what others have published: the proof of `fp8moe plan`'s times.

    python -m benchmarks.published

Each case is this project's planner given the published settings. No constant is fitted to a case: they come from the
records of single kernels and layers on one H100 and from the clusters' files. Two settings that this project has no key
for are added to its prediction, by counts:

    recomputed        whole blocks are computed once more in the backward, messages included: one more forward
    tensor_parallel   ranks that share a block's attention and shared expert: activations gathered and gradients
                      scattered over NVLink, [queries' and keys' latents, D, D, D] a token forward, twice that backward,
                      nothing beside them
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from fp8moe.cli.cluster import compose_cluster
from fp8moe.cli.compose import compose
from fp8moe.plan.cluster import Cluster
from fp8moe.plan.step_time import StepTime, step_time
from fp8moe.schedule.build import microbatches
from fp8moe.train.batch import resolve_batch
from fp8moe.train.config import TrainConfig

V3_TOKENS, V3_GPU_HOURS = 14.8e12, 2.664e6  # DeepSeek-V3 report (arXiv 2412.19437), table 1: pre-training
V3_STEP_SECONDS, V3_MFU, V3_MFU_NONCAUSAL = 19.926, 0.389, 0.437  # ISCA 2025 (arXiv 2505.09343), table 4, with MTP
V3 = ("model=dsv3_671b", "optimizer=adamw_dsv3", "precision=fp8", "seq_len=4096", "recompute=[norm,mla_up,swiglu]")
LITE = (
    *("model=dsv2_lite_16b", "precision=bf16", "seq_len=2048", "recompute=[]"),
    *("batch.sequences=1024", "batch.micro_batch=1", "parallel.ep=8"),
)


@dataclass(frozen=True)
class Case:
    """Published tokens/s/GPU of a model on a cluster, its settings here, and its source."""

    name: str
    settings: tuple[str, ...]
    cluster: str
    published: float
    source: str
    recomputed: bool = False
    tensor_parallel: int = 1


CASES = (
    Case(
        "DeepSeek-V3, 2,048 H800",
        (*V3, "parallel=dsv3_2048", "batch.sequences=15360", "batch.micro_batch=1"),
        "h800_2048",
        1542,
        "arXiv 2505.09343, table 4",
    ),
    Case(
        "Megatron-Core: DeepSeek-V3, 1,024 H100",
        (
            *(*V3, "parallel.pp=8", "parallel.ep=64", "parallel.schedule=dualpipev", "parallel.dispatcher=deep_ep"),
            *("batch.sequences=8192", "batch.micro_batch=1"),
        ),
        "h100_1024",
        1412,
        "arXiv 2603.07685; github.com/yanring/Megatron-MoE-ModelZoo, best_practice/DeepSeekV3/run.sh",
        tensor_parallel=2,
    ),
    Case(
        "pith-train: DeepSeek-V2-Lite, 8 H100, BF16",
        (*LITE, "parallel.schedule=dualpipev"),
        "h100_8",
        14325,
        "arXiv 2605.31463; github.com/mlc-ai/pith-train, benchmarks/pretraining/deepseek-v2-lite",
    ),
    Case(
        "Megatron-Core: DeepSeek-V2-Lite, 8 H100, BF16",
        LITE,
        "h100_8",
        13412,
        "arXiv 2605.31463",
    ),
    Case(
        "NeMo Automodel: Qwen3-30B-A3B, 8 H100, BF16",
        (
            *("model=qwen3_30b_a3b", "precision=bf16", "seq_len=4096", "batch.sequences=512", "batch.micro_batch=4"),
            *("parallel.ep=8", "parallel.dispatcher=deep_ep", "recompute=[]"),
        ),
        "h100_8",
        12040,
        "github.com/NVIDIA-NeMo/Automodel, docs/performance-summary.md (2025-10-02) and "
        "examples/benchmark/configs/qwen3_moe_30b_te_deepep.yaml",
        recomputed=True,
    ),
)


def read_cluster(name: str) -> Cluster:
    """The cluster of `configs/cluster/NAME.yaml`."""
    return compose_cluster([f"cluster={name}"])


@functools.cache
def planned(settings: tuple[str, ...], gpus: int) -> TrainConfig:
    """The configuration of `settings` on `gpus` GPUs, dp and micro-batch filled in; parallel.ep must be set."""
    config = compose(list(settings)).config
    dp = gpus // config.parallel.pp
    least, multiple = microbatches(config.parallel.schedule, config.parallel.pp)
    batch = resolve_batch(config.batch, dp, least=least, multiple=multiple)
    return replace(config, parallel=replace(config.parallel, dp=dp), batch=batch)


def predicted(case: Case) -> StepTime:
    """The step of a case, with what this project has no key for added to its seconds."""
    cluster = read_cluster(case.cluster)
    config = planned(case.settings, cluster.gpus)
    step = step_time(config, cluster)
    added = step.forward_seconds if case.recomputed else 0.0
    if case.tensor_parallel > 1:
        added += _tensor_parallel_seconds(config, cluster, case.tensor_parallel)
    return replace(step, seconds=step.seconds + added)


def _tensor_parallel_seconds(config: TrainConfig, cluster: Cluster, ranks: int) -> float:
    """Of a rank's step, bytes and latencies; a message brings a rank (ranks - 1) / ranks of its tokens' BF16 values."""
    model, parallel = config.model, config.parallel
    forward = (model.attention.linears(model.dim)[0][0], model.dim, model.dim, model.dim)
    passes = 3  # once forward, twice backward
    blocks = (model.num_layers + model.mtp_depth) / parallel.pp
    micro_batches = config.batch.sequences * ranks / (config.dp * config.micro_batch)
    tokens = config.micro_batch * config.seq_len / ranks * (ranks - 1)  # that come from others
    seconds = sum(2.0 * values * tokens for values in forward) / (cluster.nvlink_gb_per_second * 1e9)
    seconds += len(forward) * cluster.nvlink_microseconds * 1e-6
    return passes * seconds * blocks * micro_batches


def rows() -> Iterator[tuple[str, float, float]]:
    """(case, predicted, published) tokens/s/GPU."""
    for case in CASES:
        yield case.name, predicted(case).tokens_per_second_per_gpu, case.published


def table() -> str:
    """The table, the mean error, and DeepSeek-V3's further figures."""
    found = list(rows())
    lines = [f"{'tokens/s/GPU':48} predicted published  error"]
    lines += [f"{name:48} {ours:9,.0f} {theirs:9,.0f} {ours / theirs - 1:+6.1%}" for name, ours, theirs in found]
    mean = sum(abs(ours / theirs - 1) for _, ours, theirs in found) / len(found)
    v3 = predicted(CASES[0])
    lines += [
        f"{'mean error':68} {mean:6.1%}",
        f"DeepSeek-V3: step {v3.seconds:.2f} s (published {V3_STEP_SECONDS}), MFU {v3.mfu:.1%} causal, "
        f"{v3.mfu_noncausal:.1%} non-causal ({V3_MFU:.1%}, {V3_MFU_NONCAUSAL:.1%}), "
        f"{v3.gpu_hours(V3_TOKENS) / 1e6:.3f}M GPU hours for 14.8T tokens ({V3_GPU_HOURS / 1e6:.3f}M)",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
