"""The tables of docs/layer.md, made from traces: what each call of a mixture layer makes, and sums by phase."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path

from tests.fake_cuda.trace import Call, Trace, bytes_by, count

PAGE = Path(__file__).resolve().parents[2] / "docs" / "layer.md"
LAYER = "mixture "
BY_KIND, BY_PHASE, CALLS = "bytes by kind", "launches and bytes by phase", "every call"


def phases(trace: Trace) -> list[str]:
    """The mixture layer's phases, in the order in which they ran."""
    return list(dict.fromkeys(launch.phase for launch in trace.launches if launch.phase.startswith(LAYER)))


def tables(traces: Mapping[str, Trace]) -> dict[str, str]:
    """The page's tables by name; traces by "PRECISION-TOKENS"."""
    return {BY_PHASE: by_phase(traces), BY_KIND: by_kind(traces), CALLS: every_call(traces["fp8-4096"])}


def by_phase(traces: Mapping[str, Trace]) -> str:
    columns = [f"{precision}-{tokens}" for precision in ("fp8", "bf16") for tokens in (4096, 16384)]
    heads = [f"{c.split('-')[0].upper()}, T = {int(c.split('-')[1]):,}" for c in columns]
    lines = ["| Phase | " + " | ".join(heads) + " |", "|---|" + "---|" * len(columns)]
    for phase in phases(traces[columns[0]]):
        cells = [_cell(traces[c], phase) for c in columns]
        lines.append(f"| {phase.removeprefix(LAYER)} | " + " | ".join(cells) + " |")
    totals = [_cell(traces[c], *phases(traces[c])) for c in columns]
    return "\n".join([*lines, "| together | " + " | ".join(totals) + " |"])


def _cell(trace: Trace, *names: str) -> str:
    here = trace.of(*names)
    return f"{count(here)}, {sum(launch.bytes for launch in here) / 1e9:.2f} GB"


def by_kind(traces: Mapping[str, Trace]) -> str:
    columns = ["fp8-4096", "bf16-4096"]
    sums = [bytes_by(traces[c].of(*phases(traces[c])), lambda launch: launch.kind) for c in columns]
    lines = ["| Kind | FP8 | BF16 |", "|---|---|---|"]
    for kind in sorted(sums[0] | sums[1]):
        lines.append(f"| {kind} | " + " | ".join(f"{total[kind] / 1e9:.2f} GB" for total in sums) + " |")
    return "\n".join(lines)


def every_call(trace: Trace) -> str:
    """A row a call, in order; equal neighbours are one row."""
    lines = ["| Phase | Call | By | Makes | Launches | MB |", "|---|---|---|---|---|---|"]
    here = [call for call in trace.calls if call.phase.startswith(LAYER)]
    for (phase, op, backend, makes), same in groupby(here, _told):
        calls = list(same)
        times = f"{len(calls)} x " if len(calls) > 1 else ""
        launches, size = sum(call.launches for call in calls), sum(call.bytes for call in calls)
        lines.append(f"| {phase} | {times}{op} | {backend} | {makes} | {launches} | {size / 1e6:.1f} |")
    return "\n".join(lines)


def _told(call: Call) -> tuple[str, str, str, str]:
    return call.phase.removeprefix(LAYER), f"`{call.op}`", call.backend, ", ".join(call.results) or "in place"


def written(page: str, name: str) -> str:
    """The table of this name as the page has it."""
    _, begin, rest = page.partition(f"<!-- {name} -->\n")
    table, end, _ = rest.partition("<!-- end -->")
    assert begin and end, f"docs/layer.md has no table {name!r}"
    return table.strip()


def rewrite(traces: Mapping[str, Trace]) -> None:
    """Put the tables into the page."""
    page = PAGE.read_text()
    for name, table in tables(traces).items():
        before, begin, rest = page.partition(f"<!-- {name} -->\n")
        page = f"{before}{begin}{table}\n{rest[rest.index('<!-- end -->') :]}"
    PAGE.write_text(page)
