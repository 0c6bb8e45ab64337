"""`fp8moe watch` on the terminal: what `report.watch_state` knows, laid out by rich; figures say what they count."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fp8moe.report.watch_plot import bars, binned, curve
from fp8moe.report.watch_state import RECENT, Record, Watched
from fp8moe.train.durations import duration

CURVE_LINES = 8  # at most, a fifth of the terminal
MOST_LAYERS, MOST_RANKS = 5, 4
STALLED = 5  # times a step's mean seconds (and a minute) without a new step, from which on it stands out
PARTS = {
    "forward": "forward",
    "backward": "backward",
    "exposed_communication": "waits",
    "optimizer": "optimizer",
    "data": "data",
    "checkpoint": "checkpoint",
}


def view(
    run: Watched, width: int, height: int = 50, *, now: float | None = None, draw: Callable[[str], str] = str
) -> RenderableType:
    """All that is shown of a run, for a terminal of `width` characters and `height` lines.

    draw: gives the characters of curves as the terminal has them.
    """
    now = time.time() if now is None else now
    parts: list[RenderableType] = [_head(run, now), _progress(run, width)]
    if run.last is None:
        parts.append(Text("No step is done yet: a start compiles, loads and opens connections first."))
    else:
        parts += [_curve(run, width, max(3, min(CURVE_LINES, height // 5)), draw), _figures(run, now, draw)]
    parts += [part for part in (_experts(run, width, draw), _ranks(run), _events(run, now)) if part is not None]
    return Group(*parts)


def _head(run: Watched, now: float) -> Text:
    state = run.state(now)
    style = "green" if state in ("trains", "finished") else "bold yellow"
    text = Text.assemble((run.name, "bold"), "  ", (state, style))
    idle, step = run.seconds_since_step(now), run.mean("seconds") or 0.0
    if state == "trains" and idle is not None and idle > max(60.0, STALLED * step):
        text.append(f"  NO NEW STEP FOR {duration(idle)}: it validates, saves, or hangs", style="bold red")
    return text


def _progress(run: Watched, width: int) -> RenderableType:
    done, total = (0 if run.last is None else run.last["step"]), run.total_steps
    if total is None:
        return Text(f"step {done}")
    left = run.seconds_left()
    text = f"step {done}/{total}"
    if left is not None and done < total:
        text += f", {duration(left)} left at the pace of the last {len(run.recent)} steps"
    line = Table.grid(padding=(0, 1))
    line.add_row(ProgressBar(total=max(total, 1), completed=done, width=max(10, width // 4)), text)
    return line


def _curve(run: Watched, width: int, height: int, draw: Callable[[str], str]) -> Panel:
    """The loss over all steps; the means of ranges of steps where they are more than points."""
    points, count = 2 * max(20, width - 14), len(run.steps)
    is_mean = count > points
    values = binned(run.steps, run.losses, points if is_mean else count)
    finite = [value for value in values if value is not None]
    labels = [""] * height
    if finite:
        labels[0], labels[-1] = f"{max(finite):.3f}", f"{min(finite):.3f}"
    stretched = values if is_mean else [values[point * count // points] for point in range(points)]
    lines = [f"{label:>8} {draw(line)}" for label, line in zip(labels, curve(stretched, height), strict=True)]
    each = f"means of {count / points:.3g} steps" if is_mean else "of each step"
    what = "policy loss" if run.rewards else "training loss, nats a token"
    title = f"{what}, steps {run.steps[0]} to {run.steps[-1]}; {each}"
    return Panel(Text("\n".join(lines), no_wrap=True), title=title, title_align="left")


def _figures(run: Watched, now: float, draw: Callable[[str], str]) -> Table:
    assert run.last is not None
    last, count = run.last, len(run.recent)
    recent = f"mean of the last {count} steps" if count > 1 else "of 1 step"
    rows: list[tuple[str, str]] = [
        *_learned(run),
        ("loss", f"{_number('{:.4f}', last.get('loss'))} in step {last['step']}"),
        ("", f"{_number('{:.4f}', run.mean('loss'))} {recent}"),
        ("grad norm", f"{_number('{:.2f}', last.get('grad_norm'))} in step {last['step']}"),
        ("learning rate", f"{_number('{:.2e}', last.get('lr'))} in step {last['step']}"),
        ("validation", _validation(run)),
        ("tokens/s", f"{_number('{:,.0f}', run.mean('tokens_per_second'))} of the whole job, {recent}"),
    ]
    if (mfu := run.mean("mfu")) is not None:
        rows.append(("MFU", f"{mfu:.1%} of the BF16 peak, {recent}"))
    rows.append(("a step", f"{_number('{:.3g} s', run.mean('seconds'))}; rank 0: {_split(run)}"))
    rows.append(("memory", _memory(run)))
    if run.violations:
        count = len(run.violations)
        trend = draw(bars(binned(range(count), list(run.violations), min(40, count)), least=0.0))
        worst = f"{run.violations[-1]:.3f} in the worst layer of step {last['step']}, 0 is even"
        rows.append(("MaxVio", f"{worst}; the last {count} steps: {trend}"))
    rows.append(("skipped", f"{run.skipped} of {len(run.steps):,} steps"))
    rows.append(("checkpoint", _checkpoint(run, now)))
    return _grid(rows)


def _learned(run: Watched) -> list[tuple[str, str]]:
    """What fp8moe grpo is to raise; nothing of other runs."""
    if not run.rewards:
        return []
    (step, reward), last = run.rewards[-1], [value for _, value in run.rewards[-RECENT:]]
    recent = f"mean of the last {len(last)} batches" if len(last) > 1 else "of 1 batch"
    rows = [("reward", f"{reward:.4g} in step {step}"), ("", f"{sum(last) / len(last):.4g} {recent}")]
    if run.held_out:
        (step, accuracy), before = run.held_out[-1], run.held_out[-2:-1]
        changed = "".join(f" (step {earlier}: {value:.1%})" for earlier, value in before)
        rows.append(("held-out", f"{accuracy:.1%} right after step {step}{changed}"))
    return rows


def _checkpoint(run: Watched, now: float) -> str:
    if run.checkpoint is None:
        return "none yet"
    step, written = run.checkpoint
    return f"after step {step}, {duration(max(0.0, now - written))} ago"


def _split(run: Watched) -> str:
    """The shares of a step's parts on rank 0; below half a percent they are left out."""
    seconds = {part: run.mean("time", part) or 0.0 for part in PARTS}
    total = sum(seconds.values())
    shares = (f"{name} {seconds[part] / total:.0%}" for part, name in PARTS.items() if seconds[part] > 0.005 * total)
    return ", ".join(shares)


def _validation(run: Watched) -> str:
    if not run.validations:
        return "none yet"
    step, loss, bits = run.validations[-1]
    in_bits = "" if bits is None else f", {bits:.4f} bits a byte"
    before = f" (step {run.validations[-2][0]}: {run.validations[-2][1]:.4f})" if len(run.validations) > 1 else ""
    return f"{loss:.4f}{in_bits} after step {step}{before}"


def _memory(run: Watched) -> str:
    assert run.last is not None
    text = f"{(run.last.get('memory_bytes') or 0) / 1e9:.3g} GB on rank 0, the most so far"
    of_ranks = (run.ranks or {}).get("memory_bytes") or []
    if len(of_ranks) > 1:
        largest = max(range(len(of_ranks)), key=of_ranks.__getitem__)
        text += f"; {of_ranks[largest] / 1e9:.3g} GB on rank {largest}, the largest"
    return text


def _experts(run: Watched, width: int, draw: Callable[[str], str]) -> Panel | None:
    """The layers whose busiest expert is farthest above the mean, with the load of each expert."""
    layers: Record = (run.experts or {}).get("layers") or {}
    loads = {name: load for name, load in layers.items() if load}
    if not loads or run.experts is None:
        return None
    columns = max(8, min(64, width - 60))
    table = Table.grid(padding=(0, 2))
    worst = sorted(loads, key=lambda name: -max(loads[name]))[:MOST_LAYERS]
    for name in worst:
        load: Sequence[float] = loads[name]
        shown = draw(bars(binned(range(len(load)), load, min(columns, len(load))), least=0.0))
        idle = sum(one == 0 for one in load)
        table.add_row(
            escape(name), shown, f"{min(load):.2f} to {max(load):.2f}", f"{idle} WITHOUT TOKENS" if idle else ""
        )
    first, last = run.experts.get("first_step"), run.experts.get("step")
    title = f"load of each expert over the mean, {len(worst)} worst of {len(loads)} layers, steps {first} to {last}"
    return Panel(table, title=title, title_align="left")


def _ranks(run: Watched) -> Panel | None:
    """Ranks that work longer than others; the last comparison where the files of the ranks are missing."""
    lines = [
        f"rank {rank}: {seconds:.3g} s a step, {ratio:.2f} x the median of ranks with the same work"
        for rank, seconds, ratio in run.slow_ranks()[:MOST_RANKS]
    ]
    if run.slowest is not None:
        behind = run.slowest.get("slowest_rank_seconds_behind") or 0.0
        rank, step = run.slowest["slowest_rank"], run.slowest["step"]
        lines.append(f"slowest rank {rank}: {behind:+.3g} s beside the median, in the comparison at step {step}")
    if not lines:
        return None
    of = "" if run.ranks is None else f", mean of steps {run.ranks.get('first_step')} to {run.ranks.get('step')}"
    return Panel(Text("\n".join(lines)), title=f"ranks that lag{of}", title_align="left")


def _events(run: Watched, now: float) -> Panel | None:
    if not run.events:
        return None
    table = Table.grid(padding=(0, 2))
    for event in run.events:
        ago = f"{duration(max(0.0, now - event['time']))} ago" if isinstance(event.get("time"), int | float) else ""
        table.add_row(ago, f"step {event.get('step')}", escape(str(event.get("kind"))), escape(str(event.get("text"))))
    return Panel(table, title=f"last {len(run.events)} events", title_align="left")


def _grid(rows: Sequence[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, text in rows:
        table.add_row(Text(name, style="bold"), Text(text))
    return table


def _number(form: str, value: float | None) -> str:
    return "not finite" if value is None or not math.isfinite(value) else form.format(value)
