"""Names of a run's figures: one name each, in metrics.jsonl, wandb, TensorBoard and the Prometheus file.

A name is the field's of metrics.jsonl; a field of a group has the group before it with a slash (`time/forward`), which
wandb and TensorBoard show as a section. A list of numbers becomes its `/min`, `/mean` and `/max`: one series a rank of
2,048 is read by nobody. None, which is a figure that was not measured, and text have no series.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping
from typing import Any

# What each figure of a step is, with its unit; `docs/watching.md` has the same table.
MEANING = {
    "step": "Optimizer steps done in the whole run",
    "loss": "Training loss of the step, nats a predicted token of the global batch",
    "mtp_loss": "Loss of the multi-token prediction module, nats a predicted token",
    "aux_loss": "Balance loss of the step, a sequence",
    "grad_norm": "Norm of all gradients of the step, before clipping",
    "lr": "Learning rate of the step",
    "skipped": "1 where the step changed no weights, else 0",
    "skipped_samples/min": "First sample of a skipped step",
    "skipped_samples/max": "Last sample of a skipped step",
    "tokens": "Tokens that the step predicted, on all ranks",
    "consumed_samples": "Sequences consumed in the whole run",
    "tokens_per_second": "Predicted tokens a second of the whole job, in the step",
    "mfu": "Model FLOPs utilisation of a GPU in the step, a share of the BF16 peak",
    "max_violation": "Expert imbalance (MaxVio) of the worst layer in the step, 0 is even",
    "fp8_saturated_share": "Share of values that FP8 casts saturated, when last counted",
    "fp8_underflow_share": "Share of values that FP8 casts rounded to 0, when last counted",
    "fp8_saturated_by_kind/activations": "Share of activations that FP8 casts saturated, when last counted",
    "fp8_saturated_by_kind/gradients": "Share of gradients that FP8 casts saturated, when last counted",
    "fp8_saturated_by_kind/weights": "Share of weights that FP8 casts saturated, when last counted",
    "fp8_underflow_by_kind/activations": "Share of activations that FP8 casts rounded to 0, when last counted",
    "fp8_underflow_by_kind/gradients": "Share of gradients that FP8 casts rounded to 0, when last counted",
    "fp8_underflow_by_kind/weights": "Share of weights that FP8 casts rounded to 0, when last counted",
    "seconds": "Seconds that the step took",
    "time/data": "Seconds of the step that rank 0 read data",
    "time/forward": "Seconds of the step that rank 0 computed forwards",
    "time/backward": "Seconds of the step that rank 0 computed backwards",
    "time/exposed_communication": "Seconds of the step that rank 0 waited for messages",
    "time/optimizer": "Seconds of the step in rank 0's optimizer",
    "time/checkpoint": "Seconds that training waited for the checkpoint of the step before",
    "memory_bytes": "Most memory that rank 0 has held so far, bytes",
    "val_loss": "Validation loss, nats a predicted token, when last measured",
    "val_bits_per_byte": "Validation loss, bits a byte of text, when last measured",
    "val_loss_ema": "Validation loss of the averaged weights, nats a predicted token",
    "val_bits_per_byte_ema": "Validation loss of the averaged weights, bits a byte of text",
    "slowest_rank": "Rank that worked longest beside ranks with the same work, in the last comparison",
    "slowest_rank_seconds_behind": "Seconds by which it exceeded the others' median, over the steps compared",
    "rolled_back_from": "Step after which the run went back to a checkpoint",
    "distill_kl": "KL from the teacher's distribution to the model's, nats a predicted token (distill.teacher)",
    "rollouts": "Batch of rollouts that the step learned from, counted from 1 (fp8moe grpo, as all that follow)",
    "rollout_weights": "Step of the weights that sampled a batch",
    "reference_step": "Step of the weights that are the reference of a batch",
    "groups_drawn": "Problems of which a batch's completions were sampled",
    "groups_alike": "Of these, problems whose completions all scored alike, which give no gradient",
    "reward_failures": "Completions of a batch that a reward gave no finite number for, or none in time: left out",
    "reward": "Mean reward of a batch's completions, the weighted sum",
    "completion_length": "Mean tokens of a batch's completions",
    "ended_share": "Share of a batch's completions that ended by themselves, before grpo.max_tokens",
    "rollout_seconds": "Seconds that sampling and scoring a batch took",
    "rollout_tokens_per_second": "Sampled tokens a second, over all ranks",
    "entropy": "Mean of minus the log-probability of sampled tokens, an unbiased estimate of the policy's entropy",
    "mismatch_kl": "KL of the generator's distribution to that of training's forward, k3 on sampled tokens",
    "mismatch_largest": "Largest difference of a sampled token's log-probabilities by generator and training",
    "capped_share": "Share of tokens whose importance factor is cut at grpo.importance_cap",
    "routing_changed": "Share of the rollout's experts that training would not choose (grpo.router_replay)",
    "clip_share": "Share of an update's tokens whose ratio is clipped",
    "kl": "KL to the reference, k3 a token of the update",
    "ratio_deviation": "Mean distance of an update's ratios from 1",
    "old_kl": "KL to the policy before the batch's first update, k3 a token of the update",
    "held_out_accuracy": "Share of held-out problems that the likeliest answer is right on, when last measured",
    "held_out_length": "Mean tokens of these answers",
}


def flat(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record by their names; a bool is 0 or 1, and values that are not finite stay as they are."""
    found: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            found |= {f"{name}/{inner}": number for inner, number in flat(value).items()}
        elif isinstance(value, list | tuple):
            numbers = [item for item in value if isinstance(item, int | float)]
            if numbers and len(numbers) == len(value):
                found |= {f"{name}/min": min(numbers), f"{name}/mean": statistics.fmean(numbers)}
                found[f"{name}/max"] = max(numbers)
        elif isinstance(value, int | float):
            found[name] = int(value) if isinstance(value, bool) else value
    return found


def prometheus_name(name: str) -> str:
    """The same name as Prometheus allows it: `time/forward` is `fp8moe_time_forward`."""
    return "fp8moe_" + re.sub(r"[^a-zA-Z0-9_]", "_", name)
