"""A trace in words: launches and bytes by phase, by op and by place, and the waits."""

from __future__ import annotations

from tests.fake_cuda.trace import Launch, Trace, bytes_by, count, counts_by


def describe(trace: Trace) -> str:
    """The report, some hundred lines."""
    lines = []
    phases = list(dict.fromkeys(launch.phase for launch in trace.launches))
    for phase in phases:
        here = trace.of(phase)
        sizes, peak = sum(launch.bytes for launch in here), trace.peak.get(phase, 0)
        lines.append(f"{phase}: {count(here)} launches, {sizes / 1e9:.3f} GB, at most {peak / 1e9:.3f} GB more live")
        sizes_of = bytes_by(here, _told)
        for name, number in counts_by(here, _told).items():
            lines.append(f"    {number:5d}  {sizes_of[name] / 1e6:10.2f} MB  {name}")
    for wait in trace.waits:
        lines.append(f"wait: {wait.phase}: {wait.what} at {wait.site}")
    return "\n".join(lines)


def _told(launch: Launch) -> str:
    return f"{launch.op} ({launch.backend}, {launch.kernel}, {launch.kind}) {launch.site}"
