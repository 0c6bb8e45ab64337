"""What is asked of a teacher on the ranks of a group: all ask the same, and one verifies and stores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from fp8moe.post.distill.collect import Collector, Wanted
from fp8moe.post.distill.prompts import Prompt
from fp8moe.post.distill.store import SampleWriter, stored_samples
from fp8moe.post.distill.teacher import Failed, Reply, Request
from fp8moe.post.verify.verdict import NamedVerifier

SAMPLING = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 9, "seed": 0}


class Counting:
    """A teacher that answers with the prompt, gives up the fourth request, and counts what was taken from it."""

    identity: Mapping[str, Any] = {"teacher": "counting"}

    def __init__(self) -> None:
        self.taken: list[tuple[str, str, int]] = []

    def replies(self, requests: Sequence[Request]) -> Iterator[Reply | Failed]:
        for number, request in enumerate(requests):
            self.taken.append(request.key)
            yield Failed(request, "lost") if number == 3 else Reply(request, str(request.messages[-1]["content"]))


def collector() -> Collector:
    rows = [{"prompt": "one"}, {"prompt": "two"}, {"prompt": "three", "response": "its own"}]
    prompts = [Prompt(row["prompt"], number, row) for number, row in enumerate(rows, start=1)]
    wanted = Wanted(prompts, ("short",), 3, "", SAMPLING)
    return Collector(wanted, [NamedVerifier("long", lambda text, row: len(text) > 2)], {})


def test_a_rank_without_a_writer_takes_every_answer_and_stores_none(tmp_path: Path) -> None:
    """Answers of a teacher of several ranks are collective: a rank that stops early leaves the others waiting."""
    writing, other = Counting(), Counting()
    silent, first = collector(), collector()
    silent.collect(other, None, 1)
    took: list[None] = []
    with SampleWriter(tmp_path / "samples.jsonl").open({}) as writer:
        first.collect(writing, writer, 2, lambda: took.append(None))
    assert other.taken == writing.taken == [(name, "short", i) for name in ("one", "two") for i in range(3)]
    assert not silent.samples and not silent.failed and len(took) == 6
    stored = stored_samples(tmp_path / "samples.jsonl", {})
    assert stored.keys() == {*writing.taken, ("three", "short", 0)} - {("two", "short", 0)}
    assert {key: one["text"] for key, one in stored.items()} == {
        key: "its own" if key[0] == "three" else key[0] for key in stored
    }
    assert [failed.request.key for failed in first.failed] == [("two", "short", 0)]
    assert [request.key for request in first.missing()] == [("two", "short", 0)]


def test_without_a_teacher_stored_samples_alone_are_verified(tmp_path: Path) -> None:
    one = collector()
    one.collect(None, None, 1)
    with SampleWriter(tmp_path / "samples.jsonl").open({}) as writer:
        one.collect(None, writer, 1)
    assert list(one.samples) == [("three", "short", 0)] and len(one.missing()) == 6
    assert one.samples["three", "short", 0]["provenance"]["teacher"] == "original"
    assert "temperature" not in one.samples["three", "short", 0]["provenance"]


@pytest.mark.parametrize("workers", [1, 3])
def test_what_the_teacher_raises_comes_after_all_is_stored(workers: int, tmp_path: Path) -> None:
    class Dying(Counting):
        def replies(self, requests: Sequence[Request]) -> Iterator[Reply | Failed]:
            yield from super().replies(requests[:2])
            raise OSError("gone")

    one = collector()
    with (
        SampleWriter(tmp_path / "samples.jsonl").open({}) as writer,
        pytest.raises(OSError, match="gone"),
    ):
        one.collect(Dying(), writer, workers)
    assert len(stored_samples(tmp_path / "samples.jsonl", {})) == 3
