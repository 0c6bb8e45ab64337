"""Rollouts of a run of GRPO, counted apart from its updates, which are what the rest of a plan is of.

Memory stands in the table of ranks, where it counts with the rest (`plan.phases`). Time is a roofline, as
`forward_time` says: no rollout was ever measured on a GPU here. What a server samples takes its own machines, and is
not predicted.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fp8moe.model.memory import rank_weights
from fp8moe.plan.faster_rollouts import faster_rollouts, faster_rollouts_json, faster_rollouts_text
from fp8moe.plan.memory import RankMemory, worst_rank
from fp8moe.plan.prediction import Prediction
from fp8moe.plan.rollout_memory import has_rollouts, is_policy, rollout_sizes
from fp8moe.plan.rollout_time import RolloutTime, rollout_time
from fp8moe.plan.step_time import held_stages
from fp8moe.train.config import TrainConfig
from fp8moe.train.memory import replicas_of

GB, HOUR = 1e9, 3600.0
MEAN_SHARE = 0.5  # of grpo.max_tokens, the mean of a completion where nothing else is said


def rollouts(config: TrainConfig) -> dict[str, int] | None:
    """What the run samples: updates a batch, batches, completions, the most tokens of a batch; None of other runs."""
    if not is_policy(config):
        return None
    grpo = config.grpo
    return {
        "updates_per_batch": grpo.updates,
        "batches": -(-config.steps // grpo.updates),
        "problems": grpo.prompts,
        "samples_per_problem": grpo.samples,
        "most_tokens": grpo.group_samples * grpo.max_tokens,
    }


def reference_bytes(config: TrainConfig) -> float:
    """Of the reference's FP32 masters that the busiest pipeline rank keeps, on the host of a GPU; 0 without one."""
    if not is_policy(config) or not config.grpo.kl:
        return 0.0
    replicas = replicas_of(config)
    every = [rank_weights(config.model, held_stages(config, rank), config.ep) for rank in range(config.parallel.pp)]
    return max(4.0 * (one.dense / replicas[False] + one.expert / replicas[True]) for one in every)


def rollouts_json(found: Prediction, mean_tokens: float | None = None) -> dict[str, Any] | None:
    """All of it by name; None of other runs."""
    counts = rollouts(found.config)
    if counts is None:
        return None
    time, of_host = _time(found, mean_tokens), reference_bytes(found.config)
    faster = faster_rollouts(found, time.mean_tokens)
    sampling = time.sampling / time.seconds if has_rollouts(found.config) else None
    return {
        **counts,
        "rows_at_once": rollout_sizes(found.config).rows if has_rollouts(found.config) else None,
        "host_bytes": {"rank": of_host, "node": of_host * found.cluster.gpus_per_node},
        "time": asdict(time),
        "tokens_per_second_per_gpu": time.tokens_per_second_per_gpu,
        "share": sampling,
        "faster": faster_rollouts_json(faster),
    }


def rollouts_text(found: Prediction, mean_tokens: float | None = None) -> str | None:
    """The same as lines; None of other runs."""
    config, counts = found.config, rollouts(found.config)
    if counts is None:
        return None
    lines = [
        f"rollouts, apart from the updates above: {counts['batches']:,} batches of {counts['problems']:,} problems "
        f"x {counts['samples_per_problem']} completions, at most {counts['most_tokens']:,} tokens each, for "
        f"{counts['updates_per_batch']} updates"
    ]
    if has_rollouts(config):
        sizes = rollout_sizes(config)
        worst = worst_rank(found.balanced)
        lines.append(
            f"a rank samples {sizes.rows} completions at once, {sizes.rounds} times a batch, in caches of "
            f"{sizes.length:,} tokens; {phases_text(worst)}"
        )
    if of_host := reference_bytes(config):
        lines.append(
            f"the reference takes {of_host / GB:.2f} GB of the host's memory a rank, "
            f"{of_host * found.cluster.gpus_per_node / GB:.1f} GB a node"
        )
    time = _time(found, mean_tokens)
    faster = faster_rollouts_text(time.sampling, faster_rollouts(found, time.mean_tokens), found.cluster)
    return "\n".join([*lines, *_time_text(config, time, counts["batches"]), *filter(None, [faster])])


def phases_text(rank: RankMemory) -> str:
    """What each stretch of a rank needs, in one line."""
    return f"GB of rank {rank.pp_rank}: " + ", ".join(f"{name} {size / GB:.2f}" for name, size in rank.phases.items())


def _time(found: Prediction, mean_tokens: float | None) -> RolloutTime:
    mean = found.config.grpo.max_tokens * MEAN_SHARE if mean_tokens is None else mean_tokens
    return rollout_time(found.config, found.cluster, found.time.seconds, mean)


def _time_text(config: TrainConfig, time: RolloutTime, batches: int) -> list[str]:
    whole = f"all batches {batches * time.seconds / HOUR / 24:.3g} days"
    parts = f"log-probabilities {time.scoring:.4g}, {config.grpo.updates} updates {time.updates:.4g}"
    if time.prompts is None or time.tokens is None:
        return [f"seconds of a batch: {parts}; {whole}, the server's sampling not counted, which is not predicted"]
    return [
        f"seconds of a batch, if completions have {time.mean_tokens:,.0f} tokens on average (--mean-tokens) and the "
        f"longest {config.grpo.max_tokens:,}: prompts {time.prompts:.4g}, tokens {time.tokens:.4g}, {parts}; {whole}",
        f"sampling is {time.sampling / time.seconds:.1%} of it, {time.tokens_per_second_per_gpu or 0:,.0f} "
        "tokens/s/GPU: a roofline of bytes, FLOPs, messages and launches, slower on a GPU, where it was never measured",
    ]
