"""Settings and data files that can't be right: one sentence, the documented exit code, nothing written."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from fp8moe.cli.compose import config_groups, keys_of
from fp8moe.errors import EXIT
from fp8moe.train.config import TrainConfig
from tests.faults.runs import forked
from tests.test_limits import EXAMPLE, YARN, cases
from tests.train.runs import SMALL

SECONDS = 60.0  # within which a command that is refused has ended
LONGEST = 700  # characters of a sentence
MEANT = "name=null"  # typed, it is the experiment's name
ENDINGS = (".bin", ".idx", ".tokenizer.json")


def bad_setting(rng: random.Random, folder: Path, corpus: list[str]) -> str | None:
    """`fp8moe train` with one setting that no field allows, or that no key or group has."""
    kind = rng.random()
    if kind < 0.8:
        setting = rng.choice(_bad_values()[rng.choice(sorted(_bad_values()))])
    elif kind < 0.9:
        key = rng.choice(keys_of(TrainConfig))
        place = rng.randrange(len(key))
        setting = f"{key[:place]}{rng.choice('qxz_9')}{key[place:]}=1"
    else:
        setting = f"{rng.choice(sorted(config_groups()))}={rng.choice(('none_such', '3', '[]', '../train', ''))}"
    return _refused(folder, ["train", YARN, setting], (EXIT["configuration"],), setting)


@cache
def _bad_values() -> dict[str, list[str]]:
    """Settings with a value that the field must not take, by key: those of tests/test_limits.py, as one types them."""
    found: dict[str, list[str]] = {}
    for path, owner in _groups(EXAMPLE, ""):
        for case in cases(owner):
            key = f"{path}{case.name}"
            if not case.legal and (text := _typed(case.value)) is not None and f"{key}={text}" != MEANT:
                found.setdefault(key, []).append(f"{key}={text}")
    return found


def _groups(config: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The configurations in `config` with the beginning of their keys; those in lists can't be named on their own."""
    yield path, config
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _groups(value, f"{path}{field.name}.")


def _typed(value: object) -> str | None:
    """A value as one types it on a command line; None where it can't be, or would mean another."""
    if isinstance(value, tuple | list):
        items = [_typed(item) for item in value]
        return None if any(item is None for item in items) else f"[{','.join(items)}]"  # type: ignore[arg-type]
    if isinstance(value, str):
        return f'"{value}"' if value.isprintable() else None
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, float):
        return repr(value)
    return str(value) if isinstance(value, int) else None  # a group to which {} is given stays as it is


def bad_file(rng: random.Random, folder: Path, corpus: list[str]) -> str | None:
    """`fp8moe train` on token files of which one is broken, or `fp8moe tokenize` on text that is."""
    here = folder / "data"
    here.mkdir()
    if rng.random() < 0.25:
        name, content = rng.choice(TEXTS)
        (here / name).write_bytes(content)
        words = ["tokenize", "--input", str(here / name), "--output", str(folder / "work" / "out" / "tokens")]
        return _refused(folder, words, (EXIT["data"],), f"{name} of {content[:30]!r}")
    prefix = Path(corpus[1].removeprefix("data.paths=[").removesuffix("]"))
    for ending in ENDINGS:
        shutil.copy(f"{prefix}{ending}", here / f"tokens{ending}")
    how = rng.choice(sorted(BREAKS))
    ending, change = BREAKS[how]
    broken = here / f"tokens{ending}"
    broken.write_bytes(change(broken.read_bytes(), rng))
    words = ["train", *SMALL, "precision=bf16", "data=indexed", f"data.paths=[{here / 'tokens'}]", "run_dir=run",
             "data.cache_dir=cache", "data.validation_share=0.2", "steps=1"]  # fmt: skip
    # Ids are counted when the data is prepared: the run directory is there by then and counts as empty,
    # and so is the lock of the cache.
    left = {"run", "run/logs", "run/logs/rank-0.log", "run/starts.jsonl", "cache"} if how in LATE else set()
    return _refused(folder, words, (EXIT["data"],), how, left)


def _truncated(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def _large_id(content: bytes, rng: random.Random) -> bytes:
    place = 2 * rng.randrange(len(content) // 2)
    return content[:place] + b"\xff\xff" + content[place + 2 :]


def _fuzzed_index(content: bytes, rng: random.Random) -> bytes:
    """Up to eight bytes of the header or of the sizes and places of documents changed."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        end = rng.choice((34, len(changed)))
        changed[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(changed)


BREAKS: dict[str, tuple[str, Callable[[bytes, random.Random], bytes]]] = {
    "a truncated .bin": (".bin", _truncated),
    "an empty .bin": (".bin", lambda content, rng: b""),
    "an id past the vocabulary": (".bin", _large_id),
    "a truncated .idx": (".idx", _truncated),
    "a fuzzed .idx": (".idx", _fuzzed_index),
    "an empty .idx": (".idx", lambda content, rng: b""),
    "a truncated tokenizer": (".tokenizer.json", _truncated),
    "a tokenizer that is not UTF-8": (".tokenizer.json", lambda content, rng: b"\xff" + content),
}
LATE = ("an id past the vocabulary",)
TEXTS: tuple[tuple[str, bytes], ...] = (
    ("a.txt", b""),
    ("a.txt", b"text \xff text"),
    ("a.txt", b"\x80"),
    ("a.jsonl", b""),
    ("a.jsonl", b'{"body": "no such key"}\n'),
    ("a.jsonl", b'{"text": "right"}\n{"txt": "wrong"}\n'),
    ("a.jsonl", b'{"text": "cut off'),
    ("a.jsonl", b'{"text": 3}\n'),
    ("a.jsonl", b'["text"]\n'),
    ("a.jsonl", b'{"text": "\xff"}\n'),
)


def _refused(folder: Path, words: list[str], codes: tuple[int, ...], what: str, left: set[str] = set()) -> str | None:  # noqa: B006
    """Run a command that must be refused, in an empty directory -> what else it did."""
    work, scratch = folder / "work", folder / "tmp"
    work.mkdir()
    scratch.mkdir()

    def here(rank: int) -> None:
        os.chdir(work)
        os.environ["TMPDIR"] = str(scratch)

    ranks = forked(words, 1, folder / "said", here)
    try:
        (code,) = ranks.wait(SECONDS)
    except TimeoutError:
        return f"{what}: was not refused within {SECONDS:g} s: {ranks.sentence()}"
    said = ranks.said()
    if code not in codes:
        return f"{what}: exit code {code}: {said[-300:]!r}"
    if said.count("\n") != 1 or not re.match("fp8moe( tokenize)?: ", said) or len(said) > LONGEST:
        return f"{what}: no sentence: {said[:300]!r}"
    written = {str(path.relative_to(work)) for path in work.rglob("*")} - left
    if left:
        written = {name for name in written if not re.fullmatch(r"cache/\.checked-\w+\.lock", name)}
    written |= {path.name for path in scratch.rglob("*")}
    return f"{what}: {sorted(written)} was written" if written else None
