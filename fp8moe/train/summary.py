"""Summary of a finished run: a table on the terminal, and the same figures as `summary.json`.

Expert balance is over the whole run: MaxVio is by how much the busiest expert of a layer exceeds the layer's mean load,
relative to it (auxiliary-loss-free balance, arXiv 2408.15664), and `max_violation` is the worst layer's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from fp8moe.data.durable import write_text
from fp8moe.layers.router import max_violation
from fp8moe.train.durations import duration
from fp8moe.train.json_lines import finite
from fp8moe.train.step_trace import StepFigures

LOSS_STEPS = 10  # the training loss is the mean of so many last steps


@dataclass(frozen=True)
class Summary:
    """Figures of a finished run; losses in nats a token. None where there is nothing to measure (no tokenizer, no FP8).

    val_loss_ema: of the average of the weights (validation.ema).

    Of the whole run, also where it was resumed: steps, skipped_steps, consumed_samples (sequences of seq_len tokens),
    max_violation, and expert_token_shares, by layer each expert's share of its tokens. Of this start alone, whose first
    step is first_step: rollbacks, tokens (predicted), tokens_per_second, over its steps but the first and without
    validation and checkpoints, and wall_seconds, start-up included. loss: training loss, mean of the last loss_steps
    steps. trace: figures of the step that profile=true recorded. Of `fp8moe grpo` alone: reward, mean of the last
    reward_batches batches of rollouts of this start, and held_out_accuracy, the last measured; loss is the policy's.
    """

    loss: float
    val_loss: float
    val_loss_ema: float | None
    val_bits_per_byte: float | None
    byte_bigram_bits_per_byte: float | None
    tokens_per_second: float
    max_violation: float | None
    max_violation_by_layer: dict[str, float]
    expert_token_shares: dict[str, list[float]]
    fp8_saturated_share: float | None
    fp8_underflow_share: float | None
    steps: int
    skipped_steps: int
    tokens: int
    wall_seconds: float
    world_size: int
    precision: str
    run_dir: str
    trace: StepFigures | None
    rollbacks: int = 0
    loss_steps: int = LOSS_STEPS
    first_step: int = 1
    consumed_samples: int = 0
    seq_len: int = 0
    reward: float | None = None
    reward_batches: int = 0
    held_out_accuracy: float | None = None


def balance(loads: Mapping[str, Tensor]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """(MaxVio, each expert's share of the tokens) by layer."""
    violations = {name: max_violation(load) for name, load in loads.items()}
    shares = {name: (load / max(int(load.sum()), 1)).tolist() for name, load in loads.items()}
    return violations, shares


def write_summary(summary: Summary, path: Path) -> None:
    """Write it as JSON; the file is either complete or absent."""
    write_text(path, json.dumps(finite(asdict(summary)), indent=1, allow_nan=False) + "\n")


def table(summary: Summary) -> str:
    """The summary as the last lines that a run prints."""
    s = summary
    averaged = [] if s.val_loss_ema is None else [("  averaged weights", f"{s.val_loss_ema:.4f} nats a token")]
    mean = f"mean of the last {s.loss_steps} steps" if s.loss_steps > 1 else "of the last step"
    rows = [
        *_learned(s),
        ("training loss", f"{s.loss:.4f} nats a token, {mean}")
        if s.reward is None
        else ("policy loss", f"{s.loss:.4f}, {mean}"),
        ("validation loss", f"{s.val_loss:.4f} nats a token, after step {s.steps}"),
        *averaged,
    ]
    if s.val_bits_per_byte is not None and s.byte_bigram_bits_per_byte is not None:
        fewer = 1 - s.val_bits_per_byte / s.byte_bigram_bits_per_byte
        rows += [
            ("validation bits per byte", f"{s.val_bits_per_byte:.4f}"),
            (
                "byte bigram, same text",
                f"{s.byte_bigram_bits_per_byte:.4f}: the run takes {abs(fewer):.1%} {'less' if fewer > 0 else 'MORE'}",
            ),
        ]
    rows.append(("tokens a second", _speed(s)))
    if s.max_violation is not None:
        worst = f"{s.max_violation:.3f} in the worst layer, over the whole run; 0 is even"
        rows.append(("expert balance (MaxVio)", worst))
        for name, shares in s.expert_token_shares.items():
            rows.append((f"  {name}", _shares(shares)))
    if s.fp8_saturated_share is not None and s.fp8_underflow_share is not None:
        lost = f"{s.fp8_saturated_share:.2%} saturated, {s.fp8_underflow_share:.2%} underflowed"
        rows.append(("FP8 values", f"{lost}, in the last step that counted them"))
    if s.skipped_steps:
        rows.append(("skipped steps", f"{s.skipped_steps} of the whole run: not finite, or a spike of the loss"))
    if s.rollbacks:
        rows.append(("rollbacks", f"{s.rollbacks} to a checkpoint, in this start"))
    rows += _counts(s)
    rows.append(("run directory", s.run_dir))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {text}" for name, text in rows)


def _learned(s: Summary) -> list[tuple[str, str]]:
    """What `fp8moe grpo` is to raise; nothing of other runs."""
    if s.reward is None:
        return []
    over = f"mean of the last {s.reward_batches} batches" if s.reward_batches > 1 else "of the last batch"
    rows = [("reward", f"{s.reward:.4g}, {over} of rollouts")]
    if s.held_out_accuracy is not None:
        rows.append(("held-out accuracy", f"{s.held_out_accuracy:.1%}, when last measured"))
    return rows


def _speed(s: Summary) -> str:
    """Tokens a second, and over which steps."""
    first = min(s.first_step + 1, s.steps)  # the first step of a start compiles, allocates and opens connections
    over = f"mean of steps {first} to {s.steps}" if first < s.steps else f"of step {s.steps}"
    return f"{s.tokens_per_second:,.0f} on {count_of(s.world_size, 'process', 'processes')}, {s.precision}, {over}"


def _counts(s: Summary) -> list[tuple[str, str]]:
    """Steps, tokens and time: of the whole run, and of this start where it did not do all of it."""
    took = f"{s.tokens:,} tokens in {duration(s.wall_seconds)}, start-up included"
    if s.first_step == 1:
        return [("steps", f"{s.steps}, {took}")]
    return [
        ("steps, whole run", f"{s.steps}, {s.consumed_samples:,} sequences of {s.seq_len:,} tokens"),
        ("steps, this start", f"{s.steps - s.first_step + 1} ({s.first_step} to {s.steps}), {took}"),
    ]


def count_of(number: int, one: str, many: str) -> str:
    """The number with its noun: `1 process`, `4 processes`."""
    return f"{number} {one if number == 1 else many}"


def _shares(shares: list[float]) -> str:
    """Each expert's share where they fit on a line; otherwise the smallest and the largest."""
    if len(shares) <= 16:
        text = " ".join(f"{share:.1%}" for share in shares)
    else:
        text = f"{min(shares):.2%} to {max(shares):.2%} of the tokens an expert, {1 / len(shares):.2%} is even"
    idle = sum(share == 0 for share in shares)
    return text + (f"  {idle} EXPERTS WITHOUT TOKENS" if idle else "")
