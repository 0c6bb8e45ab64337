"""Figures of reinforcement learning (`fp8moe grpo`): rewards, held-out accuracy, lengths, how far the policy went."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fp8moe.report.curves import curve
from fp8moe.report.figure import Figure, line, named, over_tokens
from fp8moe.report.run_files import Record
from fp8moe.report.series import Drawn

_DASHES = ("solid", "dash", "dot", "dashdot")
_CURVES: tuple[tuple[str, str, str, str, dict[str, Any]], ...] = (
    ("reward", "Reward", "mean of a batch's completions", ".3f", {}),
    ("held_out_accuracy", "Held-out accuracy", "of the likeliest answers", ".1%", {"tickformat": ".0%"}),
    ("completion_length", "Length", "tokens of a completion, mean of a batch", ".1f", {"rangemode": "tozero"}),
    ("kl", "KL to the reference", "k3 a token of the update", ".4~g", {"rangemode": "tozero"}),
    (
        "clip_share",
        "Clipped ratios",
        "share of an update's tokens",
        ".2%",
        {"tickformat": ".1~%", "rangemode": "tozero"},
    ),
    ("entropy", "Entropy", "nats a token, estimated on sampled tokens", ".3f", {"rangemode": "tozero"}),
    ("groups_alike", "Groups that score alike", "of a batch, without a gradient", ".0f", {"rangemode": "tozero"}),
    ("mismatch_kl", "Rollout against training", "KL of the two forwards, k3 a token", ".3~e", {"exponentformat": "e"}),
)


def policy(runs: list[Drawn]) -> list[Figure]:
    """All of them that the runs have values for; none of a run of another method."""
    found = [
        curve(runs, key, title, note, form, name=f"policy_{key}", **axis) for key, title, note, form, axis in _CURVES
    ]
    return [figure for figure in (*found[:1], rewards(runs), *found[1:]) if figure is not None]


def _named(name: str) -> Callable[[Record], Any]:
    return lambda record: (record.get("rewards") or {}).get(name)


def rewards(runs: list[Drawn]) -> Figure | None:
    """The mean of each reward by its name, where there are several."""
    data = []
    for run in runs:
        names = dict.fromkeys(name for record in run.steps for name in record.get("rewards") or {})
        for number, name in enumerate(names if len(names) > 1 else {}):
            x, y, steps = run.series(_named(name))
            style = {"color": run.colour, "width": 1.7, "dash": _DASHES[number % len(_DASHES)]}
            data.append(line(run, x, y, steps, ".3f", named(runs, run, name), line=style))
    return Figure("policy_rewards", "Rewards by name", "before their weights", data, over_tokens("")) if data else None
