"""The variables by which ranks find each other, ports and addresses that are wrong, and waiting for rank 0."""

from __future__ import annotations

import socket
import threading
import time
from datetime import timedelta

import pytest

from fp8moe.cli.command import explain
from fp8moe.train import rendezvous
from fp8moe.train.rendezvous import Place, RendezvousError, meet, place

TWO = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_where_this_process_is() -> None:
    assert place(TWO) == Place(1, 2, "127.0.0.1", 29500)
    assert place(TWO | {"MASTER_ADDR": " host ", "RANK": " 0", "LOCAL_RANK": "0"}) == Place(0, 2, "host", 29500)
    alone = Place(0, 1, "", 0)
    assert place({}) == place({"MASTER_ADDR": "left over"}) == place({"RANK": "0", "WORLD_SIZE": "1"}) == alone


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"RANK": "2"}, "RANK=2 must be below WORLD_SIZE=2: count from 0 to 1"),
        ({"RANK": "-1"}, "RANK='-1' must be a whole number of at least 0"),
        ({"RANK": "one"}, "RANK='one' must be a whole number"),
        ({"RANK": "٣"}, "must be a whole number"),  # a digit that int() takes
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE='2.0' must be a whole number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 must be at least 1"),
        ({"WORLD_SIZE": None}, "RANK=1 is set and WORLD_SIZE is not: set RANK, WORLD_SIZE, MASTER_ADDR and"),
        ({"MASTER_ADDR": "", "MASTER_PORT": None}, "RANK=1 is set and MASTER_ADDR and MASTER_PORT are not"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http' must be a whole number"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT=0 must be from 1 to 65535"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536 must be from 1 to 65535"),
        ({"LOCAL_RANK": "4", "LOCAL_WORLD_SIZE": "4"}, "LOCAL_RANK=4 must be below LOCAL_WORLD_SIZE=4"),
        ({"RANK": None}, "WORLD_SIZE=2 is set and RANK is not"),
    ],
)
def test_a_wrong_variable_is_one_sentence_of_this_rank(changed: dict[str, str | None], sentence: str) -> None:
    environ = {name: value for name, value in (TWO | changed).items() if value is not None}
    with pytest.raises(RendezvousError) as caught:
        place(environ)
    failure = explain(caught.value)
    assert sentence in failure.sentence and (failure.code, failure.traceback) == (2, "")
    assert not failure.shared  # rank 0 may be none that says it


@pytest.fixture
def set_place(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in TWO.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def fails(seconds: float) -> str:
    begin = time.monotonic()
    with pytest.raises(RendezvousError) as caught:
        meet(timedelta(seconds=seconds))
    assert time.monotonic() - begin < seconds + 8.0
    return str(caught.value)


def test_ports_that_are_taken_silent_or_closed(set_place: pytest.MonkeyPatch) -> None:
    set_place.setattr(rendezvous, "GRACE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        set_place.setenv("MASTER_PORT", str(port))
        assert "(what listens there answers nothing): start rank 0 there" in fails(1)
        set_place.setenv("RANK", "0")
        assert f"MASTER_PORT={port} is in use on this machine" in fails(60)
    set_place.setenv("RANK", "1")
    closed = fails(1)
    assert f"MASTER_ADDR=127.0.0.1 MASTER_PORT={port} within parallel.startup_timeout=1 seconds" in closed
    assert "(Connection refused)" in closed


def test_a_host_that_does_not_exist_and_ranks_that_do_not_come(set_place: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        set_place.setenv("MASTER_PORT", str(free.getsockname()[1]))
    set_place.setenv("RANK", "0")
    assert "1 of WORLD_SIZE=2 ranks came to MASTER_PORT=" in fails(1)
    set_place.setattr(rendezvous, "RESOLVE_SECONDS", 0.1)
    set_place.setenv("MASTER_ADDR", "nohost.invalid")
    with socket.create_server(("127.0.0.1", 0)) as free:  # torch holds the one before
        set_place.setenv("MASTER_PORT", str(free.getsockname()[1]))
    for rank in "01":
        set_place.setenv("RANK", rank)
        assert "MASTER_ADDR=nohost.invalid is not known to this machine" in fails(60)


def test_a_rank_waits_for_rank_0() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    late = Place(1, 2, "127.0.0.1", port)
    waiting = threading.Thread(target=rendezvous._wait_for_listener, args=(late, time.monotonic() + 20, 20.0))
    waiting.start()
    time.sleep(0.3)
    assert waiting.is_alive()
    with socket.create_server(("127.0.0.1", port)):
        waiting.join(10)
        assert not waiting.is_alive()
