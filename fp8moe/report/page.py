"""report.html: one page of a run, or of several side by side, that loads nothing from the network.

plotly.js is in the page once, and the page's policy (Content-Security-Policy) forbids any request. Colours follow the
reader's scheme, light or dark; a printed page is light. plotly was taken for its hover, zoom and heat maps; drawing SVG
here was refused, the page would be small and mute.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from fp8moe.data.durable import write_text
from fp8moe.report import curves, parts, tables
from fp8moe.report.figure import Figure
from fp8moe.report.html import Html, chip
from fp8moe.report.policy import policy
from fp8moe.report.run_files import read_run
from fp8moe.report.series import MOST_RUNS, Drawn, draw
from fp8moe.report.settings import check_comparable

NAME = "report.html"
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
HERE = Path(__file__).parent


def write_report(
    paths: Sequence[str | Path], out: Path, defaults: Callable[[], Mapping[str, Any]] | None = None
) -> list[str]:
    """Write the page of the runs at `paths` to the file `out` -> sentences on what of them could not be read.

    defaults: gives the configuration that a run's is compared with, nested. Raises ConfigError and DataError as
    `read_run` does, and ConfigError where the runs can't be compared; OSError where `out` can't be written.
    """
    runs = [read_run(path) for path in paths]
    check_comparable(runs, MOST_RUNS)
    write_text(out, page(draw(runs), None if defaults is None else defaults()))
    return [f"{run.path}: {note}" for run in runs for note in run.notes]


def page(runs: list[Drawn], defaults: Mapping[str, Any] | None = None) -> str:
    """The page's HTML."""
    sections = [(title, _in_rows(found), rest) for title, found, rest in _sections(runs, defaults)]
    figures = [figure for _, found, _ in sections for figure in found]
    body = "".join(_section(title, found, rest) for title, found, rest in sections if found or rest)
    contents = "".join(
        f'<a href="#{_anchor(title)}">{escape(title)}</a>' for title, found, rest in sections if found or rest
    )
    name = runs[0].label if len(runs) == 1 else f"{len(runs)} runs compared"
    data = json.dumps([vars(figure) for figure in figures], separators=(",", ":")).replace("<", "\\u003c")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(name)}</title>'
        f"<style>{_text('page.css')}</style></head>\n<body>"
        f"<main>{_head(runs, name)}<nav>{contents}</nav>{body}</main>\n"
        f'<script type="application/json" id="figures">{data}</script>\n'
        f"<script>{get_plotlyjs()}</script>\n<script>{_text('page.js')}</script></body></html>\n"
    )


def _sections(runs: list[Drawn], defaults: Mapping[str, Any] | None) -> list[tuple[str, list[Figure], str]]:
    """(title, figures, HTML below them) of each section; those without either are left out of the page."""
    violation = curves.curve(runs, "max_violation", "MaxVio", "of the worst layer in each step, 0 is even", ".3f")
    times = [figure for figure in (parts.step_time(runs), parts.phases(runs)) if figure is not None]
    return [
        ("Differences", [], tables.compared(runs) if len(runs) > 1 else ""),
        ("Learning", curves.learning(runs), ""),
        ("Policy", policy(runs), ""),
        ("Speed", [*curves.speed(runs), *times], ""),
        ("Ranks", parts.ranks(runs), ""),
        ("Experts", [*parts.loads(runs), *([violation] if violation is not None else [])], ""),
        ("FP8", curves.casts(runs), tables.casts(runs)),
        ("Generated text", [], _each(runs, tables.samples)),
        ("Events", [], _each(runs, tables.events)),
        ("Configuration", [], _each(runs, lambda run: tables.configuration(run, defaults))),
        ("Versions", [], tables.versions(runs)),
    ]


def _in_rows(figures: list[Figure]) -> list[Figure]:
    """The figures in rows of two or one: one that would stand beside nothing takes its row."""
    placed: list[Figure] = []
    is_open = False
    for figure in figures:
        if figure.wide and is_open:
            placed[-1] = replace(placed[-1], wide=True)
        is_open = not figure.wide and not is_open
        placed.append(figure)
    return [*placed[:-1], replace(placed[-1], wide=True)] if is_open else placed


def _each(runs: list[Drawn], content: Any) -> str:
    """The content of each run, under its name where there are several."""
    found = [(run, content(run)) for run in runs]
    if len(runs) == 1:
        return str(found[0][1])
    return "".join(f"<h3>{chip(run.label, run.colour)}</h3>{html}" for run, html in found if html)


def _head(runs: list[Drawn], name: str) -> str:
    notes = [(run, note) for run in runs for note in (*run.files.notes, *_thinned(run))]
    many = len(runs) > 1
    said = "".join(
        f'<p class="note">{escape(f"{run.label}: " if many else "")}{escape(note)}</p>' for run, note in notes
    )
    if many:
        lines = "".join(f"<p>{chip(run.label, run.colour)} {escape(tables.state(run.files))}</p>" for run in runs)
    else:
        lines = f"<p>{escape(tables.state(runs[0].files))}</p>"
    return f"<header><small>fp8moe run report</small><h1>{escape(name)}</h1>{lines}{said}</header>{tables.tiles(runs)}"


def _thinned(run: Drawn) -> list[str]:
    if run.every == 1:
        return []
    return [f"Of {len(run.files.metrics):,} steps one in {run.every} is drawn, and all with a validation or skipped."]


def _section(title: str, figures: list[Figure], rest: str) -> str:
    cards = "".join(_card(figure) for figure in figures)
    grid = f'<div class="grid">{cards}</div>' if cards else ""
    below = f'<div class="card">{rest}</div>' if rest else ""
    return f'<section id="{_anchor(title)}"><h2>{escape(title)}</h2>{grid}{below}</section>'


def _card(figure: Figure) -> Html:
    slider = ""
    if len(figure.frames) > 1:
        last = len(figure.frames) - 1
        slider = (
            f'<label class="slider"><input type="range" min="0" max="{last}" value="{last}" data-of="{figure.name}" '
            f'aria-label="time"><output>{escape(figure.frames[-1]["label"])}</output></label>'
        )
    note = f"<p>{escape(figure.note)}</p>" if figure.note else ""
    return Html(
        f'<figure class="card{" wide" if figure.wide else ""}"><figcaption><h3>{escape(figure.title)}</h3>{note}'
        f'</figcaption><div class="plot" id="{figure.name}"></div>{slider}</figure>'
    )


def _anchor(title: str) -> str:
    return "section-" + title.lower().replace(" ", "-")


def _text(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")
