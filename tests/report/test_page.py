"""The page: every figure shows what the run's files say, in a browser too; no script error, no request, no overflow."""

from __future__ import annotations

import json
import re
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from tests.report.browser import needs_chromium, opened

PARTS = {"forward": "forward", "backward": "backward", "exposed_communication": "waiting for messages",
         "optimizer": "optimizer", "data": "data", "checkpoint": "checkpoint"}  # fmt: skip


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def figures_of(page: Path) -> dict[str, list[dict[str, Any]]]:
    """The traces of each figure, as the page's JSON holds them."""
    (text,) = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', page.read_text(), re.DOTALL)
    return {figure["name"]: figure["data"] for figure in json.loads(text)}


def points(records: list[dict[str, Any]], value: Any) -> tuple[list[int], list[Any]]:
    """(tokens, values) of the records that have one."""
    tokens = list(accumulate(record["tokens"] for record in records))
    pairs = [(x, value(record)) for x, record in zip(tokens, records, strict=True) if value(record) is not None]
    return [x for x, _ in pairs], [y for _, y in pairs]


def check_figures(shown: dict[str, list[dict[str, Any]]], runs: list[Path]) -> None:
    """Every figure against metrics.jsonl and the files beside it, read here anew."""
    seen = set()

    def expect(figure: str, run: int, value: Any, trace: dict[str, Any]) -> None:
        seen.add(figure)
        assert (trace["x"], trace["y"]) == points(lines(runs[run], "metrics"), value), (figure, trace["name"])

    for number, run in enumerate(runs):
        for meta, key in (("loss", "loss"), ("val_loss", "val_loss")):
            found = [trace for trace in shown["loss"] if trace.get("meta") == meta]
            expect("loss", number, lambda record, key=key: record.get(key), found[number])
        for figure in ("lr", "grad_norm", "tokens_per_second", "max_violation"):
            expect(figure, number, lambda record, key=figure: record.get(key), shown[figure][number])
        expect("bits_per_byte", number, lambda record: record.get("val_bits_per_byte"), shown["bits_per_byte"][number])
        loads = lines(run, "expert_load")[-1]["layers"]
        assert shown[f"experts-{number}"][0]["z"] == list(loads.values())
        memory = [value / 1e9 for value in lines(run, "ranks")[-1]["memory_bytes"]]
        assert memory in (shown["memory"][number]["x"], shown["memory"][number]["y"])
    seen |= {"memory", *(f"experts-{number}" for number in range(len(runs)))}
    for what in ("saturated", "underflow"):
        for kind, trace in zip(("activations", "gradients", "weights"), shown[f"fp8_{what}"], strict=True):
            key = f"fp8_{what}_by_kind"
            expect(f"fp8_{what}", 0, lambda record, key=key, kind=kind: (record[key] or {}).get(kind), trace)
            assert len(trace["x"]) == 3
    trace = json.loads((runs[0] / "summary.json").read_text())["trace"]
    assert dict(zip(shown["phases"][0]["y"], shown["phases"][0]["x"], strict=True)) == trace["phases"]
    for part, drawn in zip(PARTS, shown["step_time"], strict=True):
        assert drawn["name"] == PARTS[part]
        if len(runs) == 1:
            expect("step_time", 0, lambda record, part=part: record["time"][part], drawn)
        else:
            means = [[record["time"][part] for record in lines(run, "metrics")[1:]] for run in runs]
            assert drawn["x"] == pytest.approx([sum(values) / len(values) for values in means])
    assert seen | {"phases", "step_time"} == set(shown), "a figure that is not compared here"


@pytest.mark.parametrize("which", ["one", "two"])
def test_figures_are_what_the_files_say(runs: list[Path], pages: dict[str, Path], which: str) -> None:
    check_figures(figures_of(pages[which]), runs[: 1 if which == "one" else 2])


@pytest.mark.parametrize("which", ["one", "two"])
def test_the_page_needs_nothing_else(pages: dict[str, Path], which: str) -> None:
    text = pages[which].read_text()
    without_scripts = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"""(src|href)=(?!"#)|url\(|@import|<link|<img|<iframe""", without_scripts)
    assert "<script src" not in text and text.count("plotly.js v") == 1
    assert "default-src 'none'" in text and "connect-src" not in text and "http:" not in without_scripts


@needs_chromium
@pytest.mark.parametrize("which", ["one", "two"])
@pytest.mark.parametrize("width", [1400, 400])
def test_in_a_browser(runs: list[Path], pages: dict[str, Path], tmp_path: Path, which: str, width: int) -> None:
    shown = opened(pages[which], tmp_path / "browser", width)
    assert shown["wrong"] == [] and shown["resources"] == [] and shown["requests"] == []
    chosen = runs[: 1 if which == "one" else 2]
    check_figures(shown["first"], chosen)
    assert shown["drawn"] == len(shown["first"])
    for number, run in enumerate(chosen):  # the slider at its start
        record = lines(run, "expert_load")[0]
        assert shown["moved"][f"experts-{number}"][0]["z"] == list(record["layers"].values())
        assert shown["labels"][number] == "steps 1 to 4"
    assert shown["width"] == width >= shown["needed"] and shown["overlapping"] == []
    assert all(words in shown["text"] for words in ("Generated text", "Configuration", "Versions", "checkpoint"))


@needs_chromium
def test_it_is_dark_where_the_reader_is(pages: dict[str, Path], tmp_path: Path) -> None:
    light = opened(pages["one"], tmp_path / "light", 1000, "--blink-settings=preferredColorScheme=1")
    dark = opened(pages["one"], tmp_path / "dark", 1000, "--blink-settings=preferredColorScheme=0")
    assert (light["ground"], dark["ground"]) == ("rgb(246, 247, 249)", "rgb(18, 22, 28)") and dark["wrong"] == []
