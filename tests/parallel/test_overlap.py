"""The order of an overlapped pair: each phase once, each direction in its own order, messages under compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fp8moe.layers.phase import Phase
from fp8moe.parallel.overlap import LEFT_OVER, PAIR, deferred_wgrads, run_backward, run_forward, run_pair, run_wgrads

PHASES = {
    "moe": ("attn", "dispatch", "mlp", "combine"),
    "shared moe": ("keys", "gather", "attn", "dispatch", "mlp", "combine"),
    "shared dense": ("keys", "gather", "attn", "mlp"),
    "dense": ("attn", "mlp"),
    "embedding": ("embed",),
    "join": ("join",),
    "loss": ("loss",),
}
MESSAGES = ("gather", "dispatch", "combine")
Log = list[tuple[str, str, int]]


class Recorded:
    """A pass that records which of its phases are called."""

    output: Tensor
    input_gradient: Tensor

    def __init__(self, kind: str, number: int, log: Log) -> None:
        def write(part: str, name: str) -> Callable[[], None]:
            return lambda: log.append((part, name, number))

        self.phases = tuple(
            Phase(name, "compute", write("F", name), write("B", name), None if name in MESSAGES else write("W", name))
            for name in PHASES[kind]
        )

    def backward_from(self, gradient: Callable[[], Tensor]) -> None: ...


def paired(forward: list[str], backward: list[str]) -> Log:
    """The log of the pair; the forward's passes are numbered from 0, the backward's from 100."""
    log: Log = []
    run_pair([Recorded(kind, i, log) for i, kind in enumerate(forward)],
             [Recorded(kind, 100 + i, log) for i, kind in enumerate(backward)])  # fmt: skip
    return log


def listed(kind: str, layer: int) -> Log:
    """The list for blocks of one kind, the backward's numbered `layer` and what it leaves over with it."""
    first = PHASES[kind][0]
    log: Log = []
    for part, name in PAIR:
        if (part, name) == LEFT_OVER:
            log += [("W", first, layer + 1)]
        elif name in PHASES[kind] and (part, name) != ("W", first):
            log += [(part, name, 101 - layer if part == "F" else layer)]
    return log


@pytest.mark.parametrize("kind", ["moe", "shared moe", "dense", "shared dense"])
def test_two_layers_follow_the_list(kind: str) -> None:
    first = PHASES[kind][0]
    log = [*listed(kind, 101), *listed(kind, 100), ("W", first, 100)]
    log.remove(("W", first, 102))
    assert paired([kind] * 2, [kind] * 2) == log


@pytest.mark.parametrize("kind", ["moe", "shared moe"])
def test_every_message_travels_under_compute(kind: str) -> None:
    """But a forward's gather, which attention itself hides: it begins with what needs none of it."""
    log = paired([kind] * 3, [kind] * 3)
    needs = {("F", "dispatch"): ("F", "mlp", 0), ("F", "combine"): ("F", "attn", 1),
             ("B", "combine"): ("B", "mlp", 0), ("B", "dispatch"): ("B", "attn", 0),
             ("B", "gather"): ("B", "keys", 0)}  # fmt: skip
    if kind == "shared moe":
        needs["F", "combine"] = ("F", "keys", 1)
    checked = 0
    for at, (part, name, number) in enumerate(log):
        if name in MESSAGES and (part, name) != ("F", "gather"):
            needing_part, needing, later = needs[part, name]
            if (needing_part, needing, number + later) in log:
                between = log[at + 1 : log.index((needing_part, needing, number + later))]
                assert any(other not in MESSAGES for _, other, _ in between), (part, name, number)
                checked += 1
    assert checked == (4 if kind == "moe" else 5) * 3 - 1  # the last combine's output leaves the stage


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(sorted(PHASES)), max_size=6), st.lists(st.sampled_from(sorted(PHASES)), max_size=6))
def test_any_two_stages_each_in_its_own_order(forward: list[str], backward: list[str]) -> None:
    log = paired(forward, backward)
    expected = [("F", name, i) for i, kind in enumerate(forward) for name in PHASES[kind]]
    assert [entry for entry in log if entry[0] == "F"] == expected
    back = [("B", name, 100 + i) for i, kind in reversed(list(enumerate(backward))) for name in reversed(PHASES[kind])]
    assert [entry for entry in log if entry[0] == "B"] == back
    weights = [("W", name, number) for _, name, number in back if name not in MESSAGES]
    assert [entry for entry in log if entry[0] == "W"] == weights
    for entry in weights:
        assert log.index(entry) > log.index(("B", *entry[1:]))
    assert len(log) == len(expected) + len(back) + len(weights)


@pytest.mark.parametrize("kinds", [["embedding", "dense", "moe"], ["moe", "join", "moe", "loss"]])
def test_one_after_the_other_does_the_same_work(kinds: list[str]) -> None:
    log: Log = []
    passes = [Recorded(kind, i, log) for i, kind in enumerate(kinds)]
    run_forward(passes)
    run_backward(passes)
    run_wgrads(deferred_wgrads(passes))
    forward = [("F", name, i) for i, kind in enumerate(kinds) for name in PHASES[kind]]
    backward = [("B", name, i) for _, name, i in reversed(forward)]
    assert log == [*forward, *backward, *[("W", name, i) for _, name, i in backward if name not in MESSAGES]]
    alone: Log = []
    others = [Recorded(kind, i, alone) for i, kind in enumerate(kinds)]
    run_pair(others, ())
    run_pair((), others)
    assert sorted(log) == sorted(alone)


def test_the_order_is_the_documented_one() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "pipeline.md").read_text()
    (line,) = (line for line in page.splitlines() if line.startswith("    F keys | "))
    assert [tuple(entry.split(maxsplit=1)) for entry in map(str.strip, line.split("|"))] == list(PAIR)


def test_a_backward_without_a_partner_hides_its_messages_under_its_weight_gradients() -> None:
    log = [f"{part} {name} {number}" for part, name, number in paired([], ["moe", "dense", "moe", "loss"])]
    assert log[:3] == ["B loss 103", "B combine 102", "W loss 103"]
    assert log[3:9] == ["B mlp 102", "B dispatch 102", "W mlp 102", "B attn 102", "W attn 102", "B mlp 101"]
    assert log[9:14] == ["W mlp 101", "B attn 101", "B combine 100", "W attn 101", "B mlp 100"]
    assert log[14:] == ["B dispatch 100", "W mlp 100", "B attn 100", "W attn 100"]
