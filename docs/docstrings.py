"""Docstrings as reStructuredText: plain text of this project, in which nothing but `code` is markup.

autodoc reads docstrings as reStructuredText, where `x_` is a link, `*x` begins emphasis and an indented line is a
quotation. Here `code` becomes literal text, an indented paragraph a literal block, "- " a list, and any other character
stands for itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import groupby

_CODE = re.compile(r"`+([^`]+)`+")
_MARKUP = re.compile(r"([\\*_|`<>:])")
_ITEM = re.compile(r"(- |\d+\. )")


def to_rst(lines: Iterable[str]) -> list[str]:
    """The lines of one docstring, without its own indentation, as lines of reStructuredText."""
    found: list[str] = []
    for is_text, group in groupby((line.rstrip().expandtabs() for line in lines), bool):
        if is_text:
            found += [*_paragraph(list(group)), ""]
    return found


def _paragraph(lines: list[str]) -> Iterator[str]:
    """One paragraph: literal where all of it is indented, else text with its list items."""
    if all(line.startswith("  ") for line in lines) and not _ITEM.match(lines[0].lstrip()):
        yield from ("::", "", *(f"   {line}" for line in lines))
        return
    is_list = False
    for line in lines:
        text = line.lstrip()
        if item := _ITEM.match(text):
            if not is_list:
                yield ""
            is_list = True
            yield f"- {_inline(text[item.end() :])}"
        else:
            yield f"  {_inline(text)}" if is_list else _inline(text)


def _inline(text: str) -> str:
    """One line of text, escaped outside its code. Code that runs over a line's end stays text."""
    parts = _CODE.split(text)
    return "".join(f"``{part.strip()}``" if at % 2 else _MARKUP.sub(r"\\\1", part) for at, part in enumerate(parts))
