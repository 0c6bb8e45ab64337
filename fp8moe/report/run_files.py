"""The files of a run directory, read for whoever looks at a run: its report, and `fp8moe watch`.

Nothing but files is read, and no torch is loaded: a run is looked at while it trains, after it died, and on a machine
that could not train it. Files that an older version did not write are empty here. What can't be read is passed over
and said in `notes`: a run that was killed leaves half a line.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fp8moe.errors import ConfigError, DataError
from fp8moe.train.json_lines import EVENTS, EXPERT_LOAD, METRICS, RANKS, SAMPLES, read_lines

Record = dict[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """A run as its directory tells it.

    config: of the newest start, nested as config.yaml is; empty without one. metrics: a record a step, in the order of
    the steps (`train.metrics.StepReport`, with val_loss and val_bits_per_byte behind a validation). events
    (`train.events`), expert_load and ranks (`train.detail`): as they were written. samples: generated at the run's end,
    each with `prompt` and `text`. summary: of a run that has ended, else None. trace: the path of trace.json, if there
    is one. origin: versions and commit of the newest start, or of the newest checkpoint. notes: sentences on what was
    passed over.
    """

    path: Path
    config: Record
    metrics: list[Record]
    events: list[Record]
    expert_load: list[Record]
    ranks: list[Record]
    samples: list[Record]
    summary: Record | None
    trace: Path | None
    origin: Record
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The directory's name, by which runs are told apart."""
        return self.path.resolve().name


def read_run(path: str | Path) -> RunFiles:
    """The files of the run directory `path`.

    Raises ConfigError where it is no directory, and DataError where it holds no metrics or they can't be read.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(
            f"{folder} is {'a file' if folder.exists() else 'not there'}: name a run's directory{_near(folder)}"
        )
    if not (folder / METRICS).is_file():
        raise DataError(f"{folder} holds no {METRICS}, which every run writes from its first step: {_advice(folder)}")
    notes: list[str] = []
    metrics = _records(folder / METRICS, notes)
    by_step = {record["step"]: record for record in metrics if isinstance(record.get("step"), int)}
    if not by_step:
        raise DataError(f"{folder / METRICS} holds no step that can be read: wait until the run has done its first")
    events = _records(folder / EVENTS, notes)
    return RunFiles(
        path=folder,
        config=_mapping(folder / "config.yaml", notes),
        metrics=[by_step[step] for step in sorted(by_step)],
        events=events,
        expert_load=_records(folder / EXPERT_LOAD, notes),
        ranks=_records(folder / RANKS, notes),
        samples=_mapping(folder / SAMPLES, notes).get("samples", []),
        summary=_mapping(folder / "summary.json", notes) or None,
        trace=folder / "trace.json" if (folder / "trace.json").is_file() else None,
        origin=_origin(folder, events, notes),
        notes=tuple(notes),
    )


def _records(path: Path, notes: list[str]) -> list[Record]:
    """The records of a file of lines; lines that are none are counted in a note."""
    try:
        records, broken = read_lines(path)
    except OSError as error:
        raise DataError(f"{path} can't be read ({error.strerror})") from error
    if broken == [len(records) + 1]:
        notes.append(f"The last line of {path.name} is half a line and is left out.")
    elif broken:
        notes.append(
            f"{len(broken)} lines of {path.name} are no records and are left out, the first is line {broken[0]}."
        )
    return records


def _mapping(path: Path, notes: list[str]) -> Record:
    """A file's YAML or JSON mapping; empty where it is not there or is none."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.load(text, Loader=yaml.CSafeLoader)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict):
        notes.append(f"{path.name} can't be read and is left out.")
        return {}
    return content


def _origin(folder: Path, events: list[Record], notes: list[str]) -> Record:
    """Versions and commit of the newest start; of the newest checkpoint where no start noted any."""
    starts = [event for event in events if event.get("kind") == "start" and event.get("versions")]
    if starts:
        return {key: starts[-1].get(key) for key in ("versions", "commit", "world_size", "device")}
    states = list((folder / "checkpoints").glob("step-*/state.json"))
    if not states:
        return {}
    state = _mapping(max(states, key=lambda state: state.stat().st_mtime), notes)
    origin = state.get("origin", state)
    return {key: origin[key] for key in ("versions", "commit", "world_size") if key in origin}


def _near(folder: Path) -> str:
    """Which directories beside `folder` are runs, for a name that was mistyped."""
    parent = folder.parent
    runs = sorted(path.parent for path in parent.glob(f"*/{METRICS}")) if parent.is_dir() else []
    return f", such as {runs[-1]}" if runs else ", such as runs/TIME-NAME"


def _advice(folder: Path) -> str:
    runs = sorted(path.parent for path in folder.glob(f"*/{METRICS}"))
    if runs:
        return f"name a run in it, such as {runs[-1]}"
    return "name a run's directory, or wait until the run has done its first step"
