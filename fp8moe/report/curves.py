"""Figures over tokens: loss, bits per byte, learning rate, gradient norm, speed, MaxVio, what FP8 casts lose."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from fp8moe.report.figure import Figure, Trace, line, named, over_tokens
from fp8moe.report.run_files import Record
from fp8moe.report.series import Drawn, smoothed

LEAST_SMOOTHED = 20  # steps from which on a smoothed line is drawn
LEAST_SPAN = 6.0  # largest over smallest value, from which on an axis is logarithmic
MOST_MARKS = 60  # events of a run that are marked; the table has all
MARKED = {"start": "#7c8794", "rollback": "#c9402f", "failure": "#c9402f", "preempted": "#c98a1f"}
DASHES = {"activations": "solid", "gradients": "dash", "weights": "dot"}


def learning(runs: list[Drawn]) -> list[Figure]:
    """Loss, validation, KL to a teacher, learning rate, gradient norm."""
    figures = [loss(runs), bits_per_byte(runs)]
    figures.append(curve(runs, "distill_kl", "KL to the teacher", "nats a token", ".4~g", rangemode="tozero"))
    figures.append(curve(runs, "lr", "Learning rate", "", ".3~e", exponentformat="e", rangemode="tozero"))
    norm = _positive("grad_norm")
    axis = logarithmic([value for run in runs for value in run.series(norm)[1]])
    note = "before clipping, on a logarithmic axis" if axis else "before clipping"
    figures.append(curve(runs, norm, "Gradient norm", note, ".4~g", name="grad_norm", **axis))
    return [figure for figure in figures if figure is not None]


def speed(runs: list[Drawn]) -> list[Figure]:
    """Tokens a second, MFU."""
    figures = [
        curve(runs, "tokens_per_second", "Tokens a second", "of the whole job", ",.0f", rangemode="tozero"),
        curve(runs, "mfu", "MFU", "share of the peak in BF16", ".1%", tickformat=".0%", rangemode="tozero"),
    ]
    return [figure for figure in figures if figure is not None]


def loss(runs: list[Drawn]) -> Figure:
    """Training loss, smoothed as well, and validation loss, in nats a token."""
    data: list[Trace] = []
    one = len(runs) == 1
    for run in runs:
        x, y, steps = run.series("loss")
        many = len(y) >= LEAST_SMOOTHED
        thin = {"opacity": 0.45, "line": {"color": run.colour, "width": 1}, "showlegend": one} if many else {}
        data.append(line(run, x, y, steps, ".4f", named(runs, run, "training"), meta="loss", **thin))
        if many:
            name = "training, smoothed" if one else run.label
            data.append(line(run, x, smoothed(y), steps, ".4f", name, hoverinfo="skip", meta="smoothed"))
            del data[-1]["hovertemplate"]
        scored = _validations(runs, run, "val_loss", "validation")
        scored += _validations(runs, run, "val_loss_ema", "validation, averaged weights", dash="dot")
        data += [trace | {"showlegend": one} for trace in scored]
    shapes = [shape for run in runs for shape in marks(run)]
    note = "nats a token" if one else "nats a token, smoothed over steps; thin: each step, dots: validation"
    note += "; dotted lines are later starts, rollbacks and failures" if shapes else ""
    return Figure("loss", "Loss", note, data, over_tokens("nats a token") | {"shapes": shapes})


def bits_per_byte(runs: list[Drawn]) -> Figure | None:
    """Bits per byte of the validation text, and a byte bigram's of the same text."""
    data: list[Trace] = []
    for run in runs:
        data += _validations(runs, run, "val_bits_per_byte", "validation")
        data += _validations(runs, run, "val_bits_per_byte_ema", "averaged weights", dash="dot")
    known = [(run.files.summary or {}).get("byte_bigram_bits_per_byte") for run in runs]
    bigrams: set[float] = {level for level in known if level is not None}
    shapes, note = [], "of the held-out text, independent of the tokenizer"
    if len(bigrams) == 1:
        (level,) = bigrams
        shapes = [_level(level)]
        note += f"; the dotted line is a byte bigram's, {level:.3f}"
    if not data:
        return None
    return Figure(
        "bits_per_byte", "Validation, bits per byte", note, data, over_tokens("bits a byte") | {"shapes": shapes}
    )


def curve(
    runs: list[Drawn],
    key: str | Callable[[Record], Any],
    title: str,
    note: str,
    form: str,
    *,
    name: str = "",
    **axis: Any,
) -> Figure | None:
    """A figure with a line a run; None where no run has a value."""
    data = []
    for run in runs:
        x, y, steps = run.series(key)
        if x:
            data.append(line(run, x, y, steps, form, named(runs, run, "" if len(runs) > 1 else title.lower())))
    found = name or str(key)
    return Figure(found, title, note, data, over_tokens("", **axis)) if data else None


def logarithmic(values: list[float]) -> dict[str, Any]:
    """A logarithmic axis, marked at 1, 2 and 5 of each decade, of many decades at 1; none for values that are near."""
    if not values or max(values) < LEAST_SPAN * min(values):
        return {}
    first, last = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    digits = (1, 2, 5) if last - first <= 2 else (1,)
    marked = [digit * 10.0**decade for decade in range(first, last + 1) for digit in digits]
    return {"type": "log", "tickmode": "array", "tickvals": marked, "ticktext": [f"{value:g}" for value in marked]}


def casts(runs: list[Drawn]) -> list[Figure]:
    """Shares of saturated and of underflowed FP8 values by kind of tensor, where they were counted more than once."""
    figures = []
    for what, title in (("saturated", "Saturated FP8 values"), ("underflow", "Underflowed FP8 values")):
        data = []
        for run in runs:
            for kind, dash in DASHES.items():
                x, y, steps = run.series(_of_kind(f"fp8_{what}_by_kind", kind))
                if len(x) > 1:
                    style = {"line": {"color": run.colour, "width": 1.7, "dash": dash}, "mode": "lines+markers"}
                    data.append(line(run, x, y, steps, ".3%", named(runs, run, kind), **style))
        if data:
            most = max(value for trace in data for value in trace["y"])
            axis = {"tickformat": ".2~%", "range": [0, 1.1 * most if most else 0.001]}
            note = "share of what is cast, by kind of tensor"
            figures.append(Figure(f"fp8_{what}", title, note, data, over_tokens("", **axis)))
    return figures


def marks(run: Drawn) -> list[dict[str, Any]]:
    """Dotted lines where the run began again, went back or failed."""
    events = [event for event in run.files.events if event.get("kind") in MARKED and event.get("step")]
    found: Sequence[tuple[int, str]] = sorted(
        {(run.position(event["step"]), MARKED[event["kind"]]) for event in events}
    )
    return [
        {
            "type": "line",
            "x0": x,
            "x1": x,
            "y0": 0,
            "y1": 1,
            "yref": "paper",
            "line": {"color": c, "width": 1, "dash": "dot"},
        }
        for x, c in found[-MOST_MARKS:]
    ]


def _validations(runs: list[Drawn], run: Drawn, key: str, what: str, dash: str = "solid") -> list[Trace]:
    x, y, steps = run.series(key)
    style = {"color": run.colour, "width": 1.7, "dash": dash}
    marker = {"color": run.colour, "size": 7, "symbol": "circle" if dash == "solid" else "diamond"}
    more = {"mode": "lines+markers", "line": style, "marker": marker, "meta": key}
    return [line(run, x, y, steps, ".4f", named(runs, run, what), **more)] if x else []


def _level(y: float) -> dict[str, Any]:
    style = {"color": "#7c8794", "width": 1.2, "dash": "dot"}
    return {"type": "line", "x0": 0, "x1": 1, "xref": "paper", "y0": y, "y1": y, "line": style}


def _positive(key: str) -> Callable[[Record], Any]:
    """A value that a logarithmic axis has a place for."""
    return lambda record: value if (value := record.get(key)) and value > 0 else None


def _of_kind(key: str, kind: str) -> Callable[[Record], Any]:
    return lambda record: (record.get(key) or {}).get(kind)
