"""Shows a run in the terminal and keeps the picture up to date (`fp8moe watch`).

On a terminal the picture fills the alternate screen, which leaves what was there before untouched, and the last picture
stays behind it in the scroll-back. Where stdout is no terminal, and of a run that has finished, it is printed once.
"""

from __future__ import annotations

import contextlib
import io
import signal
import sys
import time
from pathlib import Path

from rich.console import Console, RenderableType
from rich.live import Live

from fp8moe.report.watch_plot import plain
from fp8moe.report.watch_state import Watched
from fp8moe.report.watch_view import view

PLAIN_WIDTH = 100  # of a picture that goes to a file or a pipe


def watch(path: str | Path, *, once: bool = False, interval: float = 2.0, console: Console | None = None) -> None:
    """Show the run in the directory `path` until it has finished or Ctrl-C; `interval`: seconds between looks.

    Raises ConfigError or DataError where it is no run's directory.
    """
    if console is None:
        console = Console() if sys.stdout.isatty() else Console(width=PLAIN_WIDTH)
    if not _has_unicode(console) and isinstance(console.file, io.TextIOWrapper):
        console.file.reconfigure(errors="replace")
    run = Watched(path)
    try:
        if not once and console.is_terminal and not run.is_finished:
            _follow(run, console, interval)
    except KeyboardInterrupt:
        pass  # the way to leave
    console.print(view(run, console.width, draw=str if _has_unicode(console) else plain))


def _follow(run: Watched, console: Console, interval: float) -> None:
    has_left = False

    def leave(number: int, frame: object) -> None:
        nonlocal has_left
        has_left = True  # an exception that is raised in a destructor or a callback is lost
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, leave)
    try:
        with Live(_picture(run, console), console=console, screen=True, auto_refresh=False) as live:
            while not run.is_finished and not has_left:
                time.sleep(interval)
                with contextlib.suppress(OSError):  # of a file server that does not answer now
                    run.refresh()
                live.update(_picture(run, console), refresh=True)
    finally:
        signal.signal(signal.SIGINT, before)


def _picture(run: Watched, console: Console) -> RenderableType:
    return view(run, console.width, console.height, draw=str if _has_unicode(console) else plain)


def _has_unicode(console: Console) -> bool:
    return console.encoding.lower().startswith("utf")
