"""A figure of the page: plotly traces and a layout as plain dicts, which the page's script draws in its own colours.

Plain dicts and not plotly's classes: the figures are JSON in the end, and importing the classes takes a second.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fp8moe.report.series import Drawn

Trace = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """A figure. name: of its element. note: a sentence below the title. wide: takes a whole row.

    frames: of a heat map, {label, z}; a slider chooses one, and the last is shown first.
    """

    name: str
    title: str
    note: str
    data: list[Trace]
    layout: dict[str, Any] = field(default_factory=dict)
    wide: bool = False
    frames: list[dict[str, Any]] = field(default_factory=list)


def line(drawn: Drawn, x: list[int], y: list[Any], steps: list[int], form: str, name: str, **more: Any) -> Trace:
    """A line over tokens. form: d3's format of a value, with a unit behind it if there is one."""
    number, _, unit = form.partition(" ")
    return {
        "type": "scatter",
        "mode": "lines" if len(x) > 1 else "markers",
        "x": x,
        "y": y,
        "customdata": steps,
        "name": name,
        "line": {"color": drawn.colour, "width": 1.7},
        "marker": {"color": drawn.colour, "size": 7},
        "hovertemplate": f"%{{y:{number}}}{' ' + unit if unit else ''} · step %{{customdata}}",
        **more,
    }


def over_tokens(title: str, **axis: Any) -> dict[str, Any]:
    """The layout of a figure over tokens, with the title of its y axis."""
    return {
        "xaxis": {"title": {"text": "tokens"}, "exponentformat": "B", "hoverformat": ",d", "rangemode": "tozero"},
        "yaxis": {"title": {"text": title}, **axis},
        "hovermode": "x unified",
    }


def named(runs: list[Drawn], run: Drawn, what: str) -> str:
    """A line's name: what it shows, and of which run where there are several."""
    return what if len(runs) == 1 else run.label if not what else f"{run.label}: {what}"
