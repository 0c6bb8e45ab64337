"""Completions that are kept: found again by name, number and limits, whatever a kill left at the end of the file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fp8moe.generate.groups import GroupSampling, Sampled
from fp8moe.post.kept_samples import KeptSamples

SAMPLING = GroupSampling(2, 8, 1.0, 16, 300, frozenset({7}))
ONE, OTHER = Sampled((4, 7), (-0.1, -1 / 3), True), Sampled((5,), (-2.0,), False)


def test_what_was_kept_is_found_to_the_bit(tmp_path: Path) -> None:
    path = tmp_path / "rollouts" / "samples-000003.jsonl"
    with KeptSamples(path, ["a", "b"], SAMPLING) as kept:
        assert kept.found == {}
        kept.keep((1, 0), ONE)
        assert path.read_bytes().endswith(b"}\n"), "on the disk before the next one comes"
    with open(path, "ab") as file:
        file.write(b'{"name": "a", "sam')  # a kill
    with KeptSamples(path, ["b", "a"], SAMPLING) as kept:
        assert kept.found == {(0, 0): ONE}
        kept.keep((1, 1), OTHER)
    assert KeptSamples(path, ["a", "b"], SAMPLING).found == {(1, 0): ONE, (0, 1): OTHER}
    for other in (dataclasses.replace(SAMPLING, temperature=0.0), dataclasses.replace(SAMPLING, max_tokens=9)):
        assert KeptSamples(path, ["a", "b"], other).found == {}
    assert KeptSamples(path, ["c"], SAMPLING).found == {}
