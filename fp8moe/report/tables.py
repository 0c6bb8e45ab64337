"""Tables of the page: results, what FP8 casts lose, events, generated text, settings, versions."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from html import escape
from typing import Any

from fp8moe.report.html import Html, chip, duration, folded, si, table
from fp8moe.report.parts import trace_figures
from fp8moe.report.run_files import RunFiles
from fp8moe.report.series import Drawn
from fp8moe.report.settings import changed, differences, flat

LOSS_STEPS = 10  # the training loss is the mean of so many last steps, as in the run's summary
MOST_EVENTS = 40  # that are shown before the others are folded


def results(files: RunFiles) -> dict[str, str]:
    """Figures of a run by their names, in words; those that it has."""
    last, steps = files.metrics[-1], files.metrics
    found: dict[str, str] = {}
    losses = [record["loss"] for record in steps[-LOSS_STEPS:] if record.get("loss") is not None]
    if losses:
        found["training loss"] = f"{statistics.fmean(losses):.4f}"
    for name, key in (("validation loss", "val_loss"), ("bits per byte", "val_bits_per_byte")):
        values = [record[key] for record in steps if record.get(key) is not None]
        if values:
            found[name] = f"{values[-1]:.4f}"
    paced = [record for record in (steps[1:] or steps) if record.get("seconds")]
    if paced:
        speed = sum(record["tokens"] for record in paced) / sum(record["seconds"] for record in paced)
        found["tokens a second"] = si(speed)
    shares = [record["mfu"] for record in steps[1:] or steps if record.get("mfu") is not None]
    if shares:
        found["MFU"] = f"{statistics.fmean(shares):.1%}"
    violation = (files.summary or {}).get("max_violation")
    if violation is None:
        violation = last.get("max_violation")
    if violation is not None:
        found["MaxVio"] = f"{violation:.3f}"
    memory = (files.ranks[-1].get("memory_bytes") if files.ranks else None) or [last.get("memory_bytes") or 0]
    if max(memory):
        found["peak memory"] = f"{max(memory) / 1e9:.3g} GB"
    figures = trace_figures(files)
    if figures:
        if figures.get("hidden") is not None:
            found["communication hidden"] = f"{figures['hidden']:.1%}"
        found["bubble"] = f"{figures['bubble'] / max(figures['seconds'], 1e-9):.1%}"
    found["skipped steps"] = f"{sum(bool(record.get('skipped')) for record in steps):,}"
    return found


HINTS = {
    "training loss": f"nats a token, last {LOSS_STEPS} steps",
    "validation loss": "nats a token",
    "bits per byte": "of held-out text",
    "tokens a second": "whole job, without step 1",
    "MFU": "mean of all steps but the first",
    "MaxVio": "worst layer, 0 is even",
    "peak memory": "of the largest rank on record",
    "communication hidden": "in the recorded step",
    "bubble": "of the recorded step",
    "skipped steps": "changed nothing",
}


def tiles(runs: list[Drawn]) -> Html:
    """The results of one run as tiles, of several as a table."""
    found = [results(run.files) for run in runs]
    names = [name for name in HINTS if any(name in result for result in found)]
    if len(runs) == 1:
        return Html(f'<dl class="tiles" style="--columns:{-(-len(names) // 2)}">' + "".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(found[0][name])}</dd><small>{escape(HINTS[name])}</small></div>"
            for name in names
        ) + "</dl>")  # fmt: skip
    rows = [
        (Html(f"{escape(name)} <small>{escape(HINTS[name])}</small>"), *(result.get(name, "") for result in found))
        for name in names
    ]
    return table(rows, ["", *(chip(run.label, run.colour) for run in runs)], "numbers")


def casts(runs: list[Drawn]) -> Html:
    """Shares of saturated and underflowed values, by kind of tensor, as they were last counted."""
    rows = []
    for run in runs:
        counted = [record for record in run.files.metrics if record.get("fp8_saturated_share") is not None]
        if not counted:
            continue
        last = counted[-1]
        kinds = {"activations and gradients": (last["fp8_saturated_share"], last["fp8_underflow_share"])}
        by_kind = last.get("fp8_saturated_by_kind") or {}
        kinds |= {kind: (share, last["fp8_underflow_by_kind"][kind]) for kind, share in by_kind.items()}
        whose = [] if len(runs) == 1 else [chip(run.label, run.colour)]
        rows += [(kind, *whose, f"{a:.3%}", f"{b:.3%}", f"step {last['step']:,}") for kind, (a, b) in kinds.items()]
    head = ["kind of tensor", *(["run"] if len(runs) > 1 else []), "saturated", "underflowed", "counted in"]
    return table(rows, head, "numbers") if rows else Html("")


def events(run: Drawn) -> Html:
    """What happened, the newest first."""
    rows = [
        (
            _clock(event.get("time")),
            event.get("step", ""),
            Html(f'<span class="kind {escape(str(event.get("kind")))}">{escape(str(event.get("kind", "")))}</span>'),
            str(event.get("text", "")),
        )
        for event in reversed(run.files.events)
    ]
    if not rows:
        skipped = [record["step"] for record in run.files.metrics if record.get("skipped")]
        words = f"Skipped steps: {', '.join(map(str, skipped[:MOST_EVENTS]))}." if skipped else "No step was skipped."
        return Html(f"<p>This run recorded no events. {words}</p>")
    head = ["time", "step", "event", ""]
    shown = table(rows[:MOST_EVENTS], head, "events")
    rest = rows[MOST_EVENTS:]
    return Html(shown + (folded(f"{len(rest):,} earlier events", table(rest, head, "events")) if rest else ""))


def samples(run: Drawn) -> Html:
    """Generated text, the prompt set apart; under a line each time that it was generated, where it says when."""
    found = [sample for sample in run.files.samples if isinstance(sample, Mapping)]
    parts, said = [], None
    for sample in found:
        when = sample.get("when")
        if when is not None and when != said:
            share = sample.get("accuracy")
            of = f", accuracy {share:.1%}" if isinstance(share, float) else ""
            parts.append(f"<p>{escape(f'{when}{of}')}</p>")
        said = when
        before, text = escape(str(sample.get("prompt", ""))), escape(str(sample.get("text", "")))
        parts.append(f'<pre class="sample"><span>{before}</span><b>{text}</b></pre>')
    return Html("".join(parts))


def configuration(run: Drawn, defaults: Mapping[str, Any] | None) -> Html:
    """What a run sets otherwise than the defaults, then all of it."""
    config = run.files.config
    if not config:
        return Html("<p>config.yaml is missing.</p>")
    every = folded("All settings", table(flat(config).items(), kind="settings"))
    if defaults is None:
        return every
    rows = changed(config, defaults)
    first = (
        table(rows, ["setting", "this run", "default"], "settings") if rows else "<p>Every setting has its default.</p>"
    )
    return Html(first + every)


def compared(runs: list[Drawn]) -> Html:
    """What differs between the runs' configurations."""
    rows = differences([run.files for run in runs])
    if not rows:
        return Html("<p>Their configurations are the same.</p>")
    return table(rows, ["setting", *(chip(run.label, run.colour) for run in runs)], "settings")


def versions(runs: list[Drawn]) -> Html:
    """Versions, commit and device of each run's newest start."""
    origins = [run.files.origin for run in runs]
    names = dict.fromkeys(name for origin in origins for name in origin.get("versions") or {})
    rows: list[tuple[Any, ...]] = [
        (title, *(str(origin.get(key) or "") for origin in origins))
        for title, key in (("commit", "commit"), ("processes", "world_size"), ("device", "device"))
        if any(origin.get(key) for origin in origins)
    ]
    rows += [(name, *((origin.get("versions") or {}).get(name, "") for origin in origins)) for name in names]
    head = ["", *(chip(run.label, run.colour) for run in runs)] if len(runs) > 1 else []
    return table(rows, head, "settings") if rows else Html("<p>No versions are on record.</p>")


def state(files: RunFiles) -> str:
    """How far a run is, on what, and how it ended, in a line."""
    steps, config, last = files.metrics, files.config, files.metrics[-1]
    of = f" of {config['steps']:,}" if isinstance(config.get("steps"), int) else ""
    tokens = sum(int(record.get("tokens") or 0) for record in steps)
    mode = (config.get("precision") or {}).get("mode", "")
    size = files.origin.get("world_size")
    device = files.origin.get("device") or "process" + ("es" if size != 1 else "")
    words = [
        f"{last['step']:,}{of} steps",
        si(tokens, "tokens"),
        str(mode).upper(),
        f"{size} x {device}" if size else "",
    ]
    seconds = sum(record.get("seconds") or 0.0 for record in steps)
    words.append(f"{duration(seconds)} in steps")
    ends = [event for event in files.events if event.get("kind") in ("start", "end", "failure", "preempted")]
    if ends and ends[-1]["kind"] != "start":
        words.append({"end": "finished", "failure": "failed", "preempted": "preempted"}[ends[-1]["kind"]])
        words.append(_clock(ends[-1].get("time")))
    return " · ".join(word for word in words if word)


def _clock(seconds: Any) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if isinstance(seconds, int | float) else ""
