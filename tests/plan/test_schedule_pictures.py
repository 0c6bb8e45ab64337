"""The pictures say what the simulator found: read back from the text, the SVG, the JSON and the trace."""

import json
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from itertools import pairwise
from typing import Any

import pytest

from fp8moe.plan.schedule_files import HUES, as_json, schedule_trace, svg
from fp8moe.plan.schedule_tables import caption
from fp8moe.plan.schedule_text import IDLE, LEGEND, draw, ticks
from fp8moe.schedule.action import Kind
from fp8moe.schedule.build import SCHEDULES, build_schedule
from fp8moe.schedule.simulate import Costs, Timeline, simulate

SVG = "{http://www.w3.org/2000/svg}"


def timeline(name: str, pp: int, n: int, message: float = 0) -> Timeline:
    return simulate(build_schedule(name, pp, n), Costs(1, 2, 1, 2.6, message))


def test_a_small_picture_letter_by_letter() -> None:
    """1F1B, 2 ranks, 3 micro-batches: 12 units of time in 24 columns."""
    assert draw(timeline("1f1b", 2, 3), 27).splitlines() == [
        "r0 F0F1····BW0 F2BW1 ··BW2 ",
        "r1 ··F0BW0 F1BW1 F2BW2 ····",
        "   |0                  |10",
    ]


def test_cells_too_narrow_for_a_name_are_letters() -> None:
    """One column a unit: a whole backward reads B then W, the rank's other chunk is in small letters."""
    zero_bubble = simulate(build_schedule("zb1p", 3, 8), Costs(1, 2, 1))
    assert zero_bubble.makespan == 26
    assert draw(zero_bubble, 29).splitlines()[:3] == [
        "r0 FFF··BWFBWFBWFBWFBWFBWBWBW",
        "r1 ·FF·BFBWFBWFBWFBWFBWFBWBWW",
        "r2 ··FBFBFBWFBWFBWFBWFBWFBWWW",
    ]
    both = simulate(build_schedule("dualpipe", 2, 8), Costs(1, 2, 1, 3))
    assert both.makespan == 24
    assert draw(both, 27).splitlines()[:2] == ["r0 FfFbwxxxXXXxxxXXXxxxbwBW", "r1 fFfBWXXXxxxXXXxxxXXXBWbw"]


@pytest.mark.parametrize("width", [80, 200])
@pytest.mark.parametrize(
    ("name", "pp", "n"), [("dualpipe", 2, 4), ("dualpipe", 16, 120), ("dualpipev", 1, 2), ("zb1p", 16, 33)]
)
def test_the_picture_keeps_to_its_width_and_tells_the_truth(name: str, pp: int, n: int, width: int) -> None:
    made = timeline(name, pp, n)
    lines = draw(made, width).splitlines()
    assert len(lines) == pp + 1 and all(len(line) <= width for line in lines)
    margin = max(len(f"r{pp - 1} "), 3)
    for rank, line in enumerate(lines[:-1]):
        assert line.startswith(f"r{rank} ".rjust(margin)) and len(line) == width
        columns = line[margin:]
        per_column = made.makespan / len(columns)
        for column, letter in enumerate(columns):
            middle = (column + 0.5) * per_column
            here = [
                t for t in made.ranks[rank] if not t.action.kind.is_message and t.start + 1e-6 < middle < t.end - 1e-6
            ]
            near = any(abs(middle - edge) <= 1e-6 for t in made.ranks[rank] for edge in (t.start, t.end))
            assert near or (letter == IDLE) == (not here)


def test_all_kinds_of_cells_are_told_apart() -> None:
    rows = "\n".join(draw(timeline("dualpipe", 8, 20), 67).splitlines()[:-1])
    assert set("FfBbWwXx" + IDLE) <= set(rows)
    assert all(letter in LEGEND for letter in ("F", "B", "W", "BW", "X", IDLE))


def test_colour_adds_nothing_but_colour() -> None:
    made = timeline("dualpipe", 4, 8)
    painted = draw(made, 100, colour=True)
    assert re.sub(r"\x1b\[[0-9;]*m", "", painted) == draw(made, 100)
    assert len(set(re.findall(r"48;5;\d+", painted))) >= 4 and painted.splitlines()[0].endswith("\x1b[0m")


def test_names_stand_on_all_cells_of_a_kind_or_on_none() -> None:
    text = "".join(line[4:] for line in draw(timeline("dualpipe", 16, 32), 200).splitlines()[:-1])
    assert not re.search(r"\d", text)
    text = "".join(line[3:] for line in draw(timeline("dualpipe", 8, 20), 200).splitlines()[:-1])
    assert len(re.findall(r"[Ff]\d+&[Bb]\d+", text)) == 8 * 20 - len(re.findall(r"[Ff]\d+(?![\d&])", text))


def test_a_step_that_takes_no_time_can_be_drawn() -> None:
    made = simulate(build_schedule("dualpipe", 2, 4), Costs(0, 0, 0, 0))
    assert set("".join(line[3:] for line in draw(made, 60).splitlines()[:2])) == {IDLE}
    ElementTree.fromstring(svg(made, caption(made)))


def test_ticks_are_round_and_few() -> None:
    assert ticks(60.4, 6) == [0, 20, 40, 60]
    assert ticks(18.5, 10) == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18]
    assert ticks(0.0, 5) == [0.0]
    for span in (1e-3, 0.7, 3.0, 99.0, 12345.0):
        assert 1 <= len(ticks(span, 7)) <= 8 and max(ticks(span, 7)) <= span * (1 + 1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_svg_has_a_cell_for_every_computation(name: str) -> None:
    made = timeline(name, 4, 8)
    words = caption(made)
    root = ElementTree.fromstring(svg(made, words))
    titles = [element.text or "" for element in root.iter(f"{SVG}title")]
    cells = [title for title in titles if "micro-batch" in title]
    assert len(cells) == sum(not t.action.kind.is_message for rank in made.ranks for t in rank)
    for kind in (Kind.F, Kind.B, Kind.W):
        assert sum(title.count(f"{kind} of stage") for title in cells) == 8 * made.schedule.num_stages
    drawn = [group for group in root.iter(f"{SVG}g") if "micro-batch" in (group[0].text or "")]
    fills = Counter(element.get("fill") for group in drawn for element in group.iter(f"{SVG}rect"))
    done = Counter(
        HUES[kind][direction == 1 or stage >= made.schedule.num_ranks]
        for rank in made.ranks
        for t in rank
        for kind, stage, _, direction in t.action.parts()
    )
    assert {hue: fills[hue] for hues in HUES.values() for hue in hues if fills[hue]} == done
    assert all(sum(fills[hue] for hue in HUES[kind]) == 8 * made.schedule.num_stages for kind in HUES)
    assert (fills[HUES[Kind.F][1]] > 0) == made.schedule.is_folded
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert set(words) <= set(texts) and "rank 3" in texts
    width, height = (float(root.get(side) or 0) for side in ("width", "height"))
    for element in root.iter(f"{SVG}rect"):
        x, y, w, h = (float(element.get(key) or 0) for key in ("x", "y", "width", "height"))
        assert x >= 0 and y >= 0 and x + w <= width + 0.02 and y + h <= height + 0.02


def test_the_svg_counts_the_phases() -> None:
    made = timeline("dualpipe", 8, 20)
    root = ElementTree.fromstring(svg(made, caption(made)))
    phases = Counter(
        match[1] for e in root.iter(f"{SVG}title") if (match := re.match(r"phase (\d), ", e.text or "")) is not None
    )
    # The two middle ranks have no phases 1, 3, 5 and 7.
    assert phases == {"1": 6, "2": 8, "3": 6, "4": 8, "5": 6, "6": 8, "7": 6, "8": 8}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("message", [0, 0.25])
def test_the_json_can_be_checked_without_us(name: str, message: float) -> None:
    """Bubble, peaks and order recomputed from the file alone."""
    made = timeline(name, 4, 12, message)
    record: dict[str, Any] = json.loads(json.dumps(as_json(made)))
    assert (record["name"], record["phases"]) == (name, list(made.schedule.phases))
    assert [[a["phase"] for a in rank] for rank in record["actions"]] == [
        [t.action.phase for t in rank] for rank in made.ranks
    ]
    assert (record["pp"], record["num_microbatches"], len(record["actions"])) == (4, 12, 4)
    done: dict[tuple[str, int, int], tuple[float, float, int]] = {}
    for rank, actions in enumerate(record["actions"]):
        clock, busy, held, peak = 0.0, 0.0, 0, 0
        for action in actions:
            if "parts" not in action:
                assert action["kind"].startswith(("SEND", "RECV")) and action["end"] >= action["start"]
                assert abs(action["peer"] - rank) == 1
                continue
            assert action["start"] >= clock - 1e-9
            clock = action["end"]
            busy += action["end"] - action["start"]
            kinds = [part["kind"] for part in action["parts"]]
            held += kinds.count("F")
            peak = max(peak, held)
            held -= kinds.count("W")
            for part in action["parts"]:
                key = (part["kind"], part["stage"], part["microbatch"])
                assert key not in done
                assert record["placement"][part["direction"]][part["stage"]] == rank
                done[key] = (action["start"], action["end"], rank)
        assert record["bubble"][rank] == pytest.approx(record["makespan"] - busy)
        assert record["peak_activations"][rank] == peak
    assert len(done) == 3 * 12 * record["num_stages"]
    assert record["makespan"] == max(end for _, end, _ in done.values())
    for (kind, stage, microbatch), (start, _, rank) in done.items():
        before = {"F": ("F", stage - 1), "B": ("B", stage + 1), "W": None}[kind]
        if before is not None and (*before, microbatch) in done:
            _, end, other = done[(*before, microbatch)]
            assert start >= end + (message if other != rank else 0) - 1e-9


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_trace_is_what_a_viewer_wants(name: str) -> None:
    made = timeline(name, 4, 8, 0.1)
    events = json.loads(json.dumps(schedule_trace(made)))["traceEvents"]
    slices: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            slices[event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    for rank, spans in slices.items():
        assert len(spans) == sum(not t.action.kind.is_message for t in made.ranks[rank])
        assert all(a[1] <= b[0] + 1e-6 for a, b in pairwise(spans))
    names = [e["args"]["name"] for e in events if e.get("name") == "thread_name"]
    assert len(names) == 4 and names[0].startswith("rank 0 (stages 0")
    starts = {e["id"]: e for e in events if e["ph"] == "s"}
    ends = {e["id"]: e for e in events if e["ph"] == "f"}
    assert starts.keys() == ends.keys()
    assert len(starts) == sum(t.action.kind.is_send for rank in made.ranks for t in rank)
    for key, start in starts.items():
        end = ends[key]
        assert start["ts"] < end["ts"] and abs(start["tid"] - end["tid"]) == 1 and end["bp"] == "e"
        for event in (start, end):
            assert any(low < event["ts"] < high for low, high in slices[event["tid"]])
    for rank, cells in enumerate(made.ranks):
        held = [(e["ts"], e["args"]["stage-activations"]) for e in events if e["ph"] == "C" and e["tid"] == rank]
        assert max(count for _, count in held) == made.peak_activations[rank] and held[-1][1] == 0
        freed = [ts for (_, before), (ts, after) in pairwise(held) if after < before]
        ends_of_w = [1000 * t.end for t in cells if Kind.W in [kind for kind, *_ in t.action.parts()]]
        assert freed == pytest.approx(ends_of_w)
