"""Hang detector without processes: what it publishes and reports, from given states of ranks and faked clocks."""

from __future__ import annotations

import json
import os
import threading
import time
from typing import Any

import pytest

from fp8moe.errors import HangError
from fp8moe.parallel import hang

State = dict[str, Any]


def state(heartbeat: int, joined: dict[str, int], waits: list[tuple[str, int, list[int]]] | None = None) -> State:
    """What a rank has published: its heartbeat, how many collectives of each group it joined, what it waits for."""
    groups = {group: (number, f"op {number}", "0-3") for group, number in joined.items()}
    return {"heartbeat": heartbeat, "groups": groups, "process": {"pid": 7}, "waits": waits or []}


class Published(hang._Detector):
    """Rank 0's detector, whose store holds `before` at its first reading and `after` from the second on."""

    def __init__(self, before: dict[int, State], after: dict[int, State]) -> None:
        super().__init__(None, 0, None, process={})  # type: ignore[arg-type]
        self.readings = [before, after]

    def read(self, ranks: Any) -> dict[int, State]:
        assert list(ranks) == [0, 1, 2, 3]
        return self.readings.pop(0)


ALIVE, SILENT = (1, 2), (2, 2)  # a heartbeat's two readings
CASES: list[tuple[str, dict[int, tuple[tuple[int, int], dict[str, int], list[Any]]], str, list[int]]] = [
    ("behind", {1: (ALIVE, {"dp": 5}, []), 2: (ALIVE, {"dp": 4}, []), 3: (ALIVE, {"dp": 6}, [])},
     "rank 2 is alive and stopped after number 4 (op 4)", []),
    ("never joined", {1: (ALIVE, {"dp": 5}, []), 2: (ALIVE, {}, []), 3: (ALIVE, {"dp": 5}, [])},
     "rank 2 is alive and stopped after number 0 (nothing)", []),
    ("not started", {1: (ALIVE, {"dp": 5}, []), 2: (ALIVE, {"dp": 5}, [])}, "rank 3 has not started", []),
    ("not started, and another behind", {2: (ALIVE, {"dp": 4}, []), 3: (ALIVE, {"dp": 5}, [])},
     "rank 1 has not started; rank 2 is alive and stopped after number 4 (op 4)", []),
    ("silent in the collective", {1: (ALIVE, {"dp": 5}, []), 2: (SILENT, {"dp": 5}, []), 3: (ALIVE, {"dp": 5}, [])},
     "rank 2 has ended or is frozen", [2]),
    ("silent before it", {1: (ALIVE, {"dp": 5}, []), 2: (ALIVE, {"dp": 5}, []), 3: (SILENT, {"dp": 3}, [])},
     "rank 3 has ended or is frozen and stopped after number 3 (op 3)", [3]),
    ("two", {1: (ALIVE, {"dp": 4}, []), 2: (ALIVE, {"dp": 5}, []), 3: (SILENT, {"dp": 3}, [])},
     "rank 1 is alive and stopped after number 4 (op 4); "
     "rank 3 has ended or is frozen and stopped after number 3 (op 3)", [3]),
    ("waits for another", {1: (ALIVE, {"dp": 4, "pp": 2}, [("pp", 2, [1, 3])]), 2: (ALIVE, {"dp": 5}, []),
                           3: (ALIVE, {"dp": 5, "pp": 1}, [])},
     "rank 3 is alive and stopped after number 1 (op 1); between them and rank 0: rank 1", []),
    ("an old wait", {1: (SILENT, {"dp": 4, "pp": 2}, [("pp", 2, [1, 3])]), 2: (ALIVE, {"dp": 4}, []),
                     3: (ALIVE, {"dp": 5, "pp": 2}, [])},
     "rank 1 has ended or is frozen and stopped after number 4 (op 4); "
     "rank 2 is alive and stopped after number 4 (op 4)", [1]),
    ("a circle", {1: (ALIVE, {"dp": 4, "pp": 2}, [("pp", 2, [1, 3])]), 2: (ALIVE, {"dp": 5}, []),
                  3: (ALIVE, {"dp": 5, "pp": 1}, [("ep", 1, [1, 3])])},
     "rank 1 is alive and stopped after number 4 (op 4); rank 3 is alive and stopped after number 1 (op 1)", []),
    ("nobody", {1: (ALIVE, {"dp": 5}, []), 2: (ALIVE, {"dp": 6}, []), 3: (ALIVE, {"dp": 5}, [])},
     "no rank is behind", []),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_who_is_missing_by_what_ranks_have_published(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 waits in collective 5 of the group dp of ranks 0 to 3."""
    _, published, says, silent = case
    monkeypatch.setattr(hang.dist, "get_world_size", lambda: 4)
    slept: list[float] = []
    monkeypatch.setattr(hang.time, "sleep", slept.append)
    readings = [
        {0: state(9, {"dp": 5}), **{rank: state(beats[i], joined, waits) for rank, (beats, joined, waits) in
                                    published.items()}}
        for i in (0, 1)
    ]  # fmt: skip
    detector = Published(*readings)
    assert hang.missing_ranks(detector, "dp", 5, [0, 1, 2, 3]) == says
    assert sorted(detector.silent) == silent
    assert slept[0] > 2 * hang.HEARTBEAT  # every living rank has published in between


def test_a_rank_that_had_not_published_before_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hang.dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(hang.time, "sleep", lambda seconds: None)
    after = {rank: state(1, {"dp": 5 if rank < 3 else 2}) for rank in range(4)}
    assert hang.missing_ranks(Published({}, after), "dp", 5, [0, 1, 2, 3]).startswith("rank 3 is alive and stopped")


def test_a_store_that_has_ended_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(self: Any, ranks: Any) -> Any:
        raise RuntimeError("Connection reset\nby the store")

    monkeypatch.setattr(hang.dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(Published, "read", gone)
    says = hang.missing_ranks(Published({}, {}), "dp", 5, [0, 1, 2, 3])
    assert says == "rank 0, which keeps the job's store, has ended or is frozen (Connection reset)"


def test_a_store_that_does_not_answer_is_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen process keeps its connections: a call to its store neither fails nor ends."""
    frozen = threading.Event()
    detector = hang._Detector(_FrozenStore(frozen), 1, None)  # type: ignore[arg-type]
    monkeypatch.setattr(hang.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(hang, "STORE_SECONDS", 0.2)
    monkeypatch.setitem(os.environ, "TORCHELASTIC_USE_AGENT_STORE", "True")
    threading.Thread(target=detector.publish, daemon=True).start()  # the heartbeat waits in it, with the lock
    begun = time.monotonic()
    says = hang.missing_ranks(detector, "ep0", 3, [0, 1])
    assert says == "the launcher, which keeps the job's store, has ended or is frozen (no answer within 0.2 s)"
    assert time.monotonic() - begun < 5
    frozen.set()


class _FrozenStore:
    def __init__(self, until: threading.Event) -> None:
        self._until = until

    def set(self, key: str, value: str) -> None:
        self._until.wait(60)

    def check(self, keys: list[str]) -> bool:
        self._until.wait(60)
        return False


@pytest.fixture
def detector(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Any:
    """A detector without a thread, with a store in memory and notes in a file."""
    notes = os.open(tmp_path / "rank-0.json", os.O_CREAT | os.O_RDWR, 0o600)
    detector = hang._Detector(hang.dist.HashStore(), 0, notes)
    monkeypatch.setattr(hang, "_current", [detector])
    monkeypatch.setattr(hang, "missing_ranks", lambda *asked: f"asked for {asked[1:]}")
    yield detector
    os.close(notes)


def test_a_pending_collective_is_published_until_it_ends(detector: hang._Detector, tmp_path: Any) -> None:
    first, second = (hang.PendingCollective("dp0", [0, 1, 2], name) for name in ("all_reduce", "all_to_all (rows)"))
    hang.PendingCollective("pp0, link 0 to 2", [0, 2], "F0.1")
    notes = json.loads((tmp_path / "rank-0.json").read_text())
    assert notes == {
        "last": "pp0, link 0 to 2",
        "groups": {"dp0": [2, "all_to_all (rows)", "0-2"], "pp0, link 0 to 2": [1, "F0.1", "0, 2"]},
    }
    with first:
        detector.publish()
        assert detector.read([0, 1])[0]["waits"] == [["dp0", 1, [0, 1, 2]]]
    with second:
        pass
    detector.publish()
    read = detector.read([0, 1])
    assert list(read) == [0] and (read[0]["heartbeat"], read[0]["waits"]) == (2, [])
    assert read[0]["groups"] == notes["groups"] and read[0]["process"]["pid"] == os.getpid()


@pytest.mark.parametrize("text, lost", [("[gloo/pair.cc:9] Connection  closed by peer", True), ("Timed out", False)])
def test_a_failed_collective_says_what_failed_and_stays_published(
    detector: hang._Detector, caplog: pytest.LogCaptureFixture, text: str, lost: bool
) -> None:
    pending = hang.PendingCollective("dp0", [0, 1], "all_reduce")
    with pytest.raises(HangError) as caught, pending:
        raise RuntimeError(text)
    clean = text.split("] ")[-1].replace("  ", " ")
    assert (
        str(caught.value)
        == f"asked for ('dp0', 1, [0, 1]): all_reduce, number 1 of group dp0 (ranks 0-1) failed ({clean})"
    )
    assert caught.value.secondary == lost
    assert detector.read([0])[0]["waits"] == [["dp0", 1, [0, 1]]]  # published at once, and kept
    assert len(caplog.messages) == 2 and caplog.messages[0].endswith("who is missing follows")


def test_errors_that_are_no_hang_pass_unchanged(detector: hang._Detector) -> None:
    for error in (HangError("told already"), ValueError("a setting")):
        with pytest.raises(type(error)) as caught, hang.PendingCollective("dp0", [0, 1], "all_reduce"):
            raise error
        assert caught.value is error


def test_only_a_collective_that_is_overdue_is_reported(
    detector: hang._Detector, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    hang.report_after(10.0)
    now = [100.0]
    monkeypatch.setattr(hang.time, "monotonic", lambda: now[0])
    early, late = (hang.PendingCollective("dp0", [0, 1], name) for name in ("first", "second"))
    with early:
        now[0] = 106.0
        with late:
            detector.report_overdue()
            assert caplog.messages == []
            now[0] = 112.0
            detector.report_overdue()  # the first is 12 s old, the second 6
            for thread in threading.enumerate():
                if thread.name == "hang report":
                    thread.join(5)
            assert [text.split(": ")[-1] for text in caplog.messages] == [
                "first, number 1 of group dp0 (ranks 0-1) has not ended for 12 s"
            ]
            now[0] = 200.0
            detector.report_overdue()  # once
    assert len(caplog.messages) == 1
