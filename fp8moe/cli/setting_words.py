"""What is wrong with a word that is no setting as hydra reads it, and how to write it.

Hydra's own words name its grammar ("no viable alternative at input '[a,]'"). A setting that is nearly right is mended,
and shown where the mended one can be read. Refused: taking the mended one in silence, since it is a guess.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable

from fp8moe.limits import shown

_KEY = re.compile(r"[+~]{0,2}\w[\w.@/-]*", re.ASCII)
_EMPTY_ENTRY = re.compile(r"(?<=[\[,{])\s*,|,\s*(?=[\]},])")
_HOME = re.compile(r"(^|[\[,]\s*)~(?=/)")
PATTERN = 'KEY="VALUE"'
_MOST = 150  # characters of a setting that is shown mended
_CLOSING = {"[": "]", "{": "}"}


def no_setting(word: str, instead: str | None) -> str:
    """The sentence on a word without `=`. instead: the setting that it may mean."""
    return f"{shown(word)} is not a setting: write {instead or 'key=value, without spaces around ='}"


def unreadable(setting: str, reason: str, reads: Callable[[str], bool]) -> str:
    """The sentence on a setting that hydra can't read. reason: hydra's. reads: whether it can read another."""
    key, _, value = setting.partition("=")
    value = value.strip()
    if key != key.strip():
        return f"{shown(setting)} has a space beside its key: write {_word(f'{key.strip()}={value}')}"
    if not _KEY.fullmatch(key):
        return f"{shown(setting)} begins with no key, which is a word of letters and dots: see fp8moe keys"
    if (home := _HOME.sub(r"\1$HOME", value)) != value:
        return f'{shown(setting)} has a ~ that the shell leaves as it is: write "{key}={home}"'
    for wrong, mended in (
        ("has an empty entry in its list", _without_empty_entries(value)),
        ("has a list that does not end", value + _CLOSING.get(value[:1], "")),
        ("has a sign that is read in quotes alone", _quoted(value)),
    ):
        if mended != value and reads(f"{key}={mended}"):
            is_short = len(mended) <= _MOST and mended.isprintable()
            return f"{shown(setting)} {wrong}: write {_word(f'{key}={mended}' if is_short else PATTERN)}"
    return f"{shown(setting)} can't be read as key=value ({reason}): write '{PATTERN}'"


def _without_empty_entries(value: str) -> str:
    before = ""
    while value != before:
        before, value = value, _EMPTY_ENTRY.sub("", value, count=1)
    return value


def _quoted(value: str) -> str:
    """The value as text, or as a list of texts."""
    if value.startswith("[") and value.endswith("]"):
        return f"[{','.join(_text(one) for one in value[1:-1].split(','))}]"
    return _text(value)


def _text(value: str) -> str:
    value = value.strip().strip("\"'")
    return f'"{value}"' if '"' not in value else value


def _word(setting: str) -> str:
    """A setting as it is typed in a shell: brackets, as all over the documentation, without quotes."""
    return setting if re.fullmatch(r"[\w.,:=/@%+\[\]-]*", setting) else shlex.quote(setting)
