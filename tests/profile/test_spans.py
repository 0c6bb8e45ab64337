"""Spans: who is told of them, when, and how waits are counted."""

from __future__ import annotations

import time
from typing import Any

import pytest

from fp8moe.profile.spans import exposed_seconds, listening, span, waiting


class Listener:
    def __init__(self, name: str, log: list[Any]) -> None:
        self.name, self.log = name, log

    def began(self, name: str) -> str:
        self.log.append((self.name, "began", name))
        return f"{self.name} of {name}"

    def ended(self, name: str, began: str) -> None:
        self.log.append((self.name, "ended", name, began))


def test_listeners_are_told_in_order_and_of_the_end_in_reverse() -> None:
    log: list[Any] = []
    with listening(Listener("a", log)), listening(Listener("b", log)), span("F attn"):
        log.append("inside")
    with span("unheard"):
        pass
    assert log == [
        ("a", "began", "F attn"), ("b", "began", "F attn"), "inside",
        ("b", "ended", "F attn", "b of F attn"), ("a", "ended", "F attn", "a of F attn"),
    ]  # fmt: skip


def test_a_span_that_fails_ends_and_a_block_that_fails_stops_listening() -> None:
    log: list[Any] = []
    with pytest.raises(KeyError), listening(Listener("a", log)), span("F attn"):
        raise KeyError
    with span("unheard"):
        pass
    assert [entry[1] for entry in log] == ["began", "ended"]


def test_waits_add_up_until_they_are_read() -> None:
    exposed_seconds()
    with waiting():
        time.sleep(0.02)
    with pytest.raises(KeyError), waiting():
        time.sleep(0.02)
        raise KeyError
    assert 0.04 <= exposed_seconds() < 5
    assert exposed_seconds() == 0.0
