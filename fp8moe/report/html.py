"""Pieces of HTML: tables and notes, of text that is escaped here and nowhere else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any


class Html(str):
    """Text that is HTML already."""


def cell(value: Any) -> str:
    """A value as the content of a table's cell."""
    if isinstance(value, Html):
        return value
    return escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def table(rows: Iterable[Sequence[Any]], head: Sequence[Any] = (), kind: str = "") -> Html:
    """A table; the first cell of a row names it. It scrolls by itself where it is wider than the screen."""
    names = "".join(f'<th scope="col">{cell(name)}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{cell(first)}</th>{"".join(f"<td>{cell(value)}</td>" for value in rest)}</tr>'
        for first, *rest in rows
    )
    top = f"<thead><tr>{names}</tr></thead>" if head else ""
    return Html(f'<div class="scroll"><table class="{kind}">{top}<tbody>{body}</tbody></table></div>')


def folded(summary: str, content: str) -> Html:
    """Content behind a line that opens it."""
    return Html(f"<details><summary>{escape(summary)}</summary>{content}</details>")


def chip(label: str, colour: str) -> Html:
    """A run's name with its colour."""
    return Html(f'<span class="chip"><i style="background:{colour}"></i>{escape(label)}</span>')


def si(value: float, unit: str = "") -> str:
    """A number with three digits and a prefix: 12.3k tokens."""
    for limit, prefix in ((1e12, "T"), (1e9, "B" if "token" in unit else "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if prefix == 'k' else limit):.3g}{prefix} {unit}".strip()
    return f"{value:,.0f} {unit}".strip()


def duration(seconds: float) -> str:
    """Seconds as 45 s, 3 min 20 s, 5 h 07 min or 3 d 4 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.3g} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole // 60 % 60:02d} min"
    return f"{whole // 86400} d {whole // 3600 % 24} h"
