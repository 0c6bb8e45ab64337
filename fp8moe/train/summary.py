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
from fp8moe.train.json_lines import finite
from fp8moe.train.step_trace import StepFigures


@dataclass(frozen=True)
class Summary:
    """Figures of a finished run; losses in nats a token. None where there is nothing to measure (no tokenizer, no FP8).

    val_loss_ema: of the average of the weights (validation.ema). rollbacks: to a checkpoint, of this attempt.

    loss: training loss, mean of the last steps. tokens_per_second: over the training steps of this attempt, without
    validation and checkpoints; wall_seconds: of the attempt, start-up included. expert_token_shares: by layer, each
    expert's share of its tokens. trace: figures of the step that profile=true recorded.
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
    rows = [("training loss", f"{s.loss:.4f} nats a token"), ("validation loss", f"{s.val_loss:.4f} nats a token")]
    rows += averaged
    if s.val_bits_per_byte is not None and s.byte_bigram_bits_per_byte is not None:
        fewer = 1 - s.val_bits_per_byte / s.byte_bigram_bits_per_byte
        rows += [
            ("validation bits per byte", f"{s.val_bits_per_byte:.4f}"),
            (
                "byte bigram, same text",
                f"{s.byte_bigram_bits_per_byte:.4f}: the run takes {abs(fewer):.1%} {'less' if fewer > 0 else 'MORE'}",
            ),
        ]
    rows.append(
        (
            "tokens a second",
            f"{s.tokens_per_second:,.0f} on {count_of(s.world_size, 'process', 'processes')}, {s.precision}",
        )
    )
    if s.max_violation is not None:
        rows.append(("expert balance (MaxVio)", f"{s.max_violation:.3f} in the worst layer, 0 is even"))
        for name, shares in s.expert_token_shares.items():
            rows.append((f"  {name}", _shares(shares)))
    if s.fp8_saturated_share is not None and s.fp8_underflow_share is not None:
        rows.append(("FP8 values", f"{s.fp8_saturated_share:.2%} saturated, {s.fp8_underflow_share:.2%} underflowed"))
    if s.skipped_steps:
        rows.append(("skipped steps", f"{s.skipped_steps}, whose numbers were not finite or whose loss was a spike"))
    if s.rollbacks:
        rows.append(("rollbacks", f"{s.rollbacks} to a checkpoint"))
    rows.append(("steps", f"{s.steps}, {s.tokens:,} tokens, {duration(s.wall_seconds)}"))
    rows.append(("run directory", s.run_dir))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {text}" for name, text in rows)


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


def duration(seconds: float) -> str:
    """Seconds as 45s, 3m20s or 5h07m."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole // 60 % 60:02d}m"
