"""`fp8moe keys`: every key of a run with its type, range, default and meaning, or those that a word finds."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

from fp8moe.cli.command import Parser, make_parser, parse
from fp8moe.errors import ConfigError

if TYPE_CHECKING:
    from fp8moe.cli.key_table import Key

DESCRIPTION = """\
Print the keys of a run: type, range, default and meaning of each. WORD finds keys by their name, their meaning, or the
name that another program has for them.

  fp8moe keys                     all
  fp8moe keys warmup              those about the warm-up
  fp8moe keys learning_rate       the key of this meaning
"""
PAGE = """\
# Every key

What `fp8moe train` takes as `key=value`: the output of `fp8moe keys --markdown`, read from the configuration classes.
`fp8moe keys WORD` searches; `fp8moe train --cfg job ...` prints the values of a run. The defaults are those of
`configs/train.yaml`, with `model=tiny`; a key without one must be set where its group is used. A group is chosen by
name (`model=dsv3_671b`), and its keys are changed by theirs (`model.num_layers=8`).
"""


def command_parser() -> Parser:
    """The parser of the command line."""
    parser = make_parser("keys", DESCRIPTION)
    parser.add_argument(
        "word", nargs="*", metavar="WORD", help="part of a key's name or meaning, or another program's name"
    )
    parser.add_argument("--markdown", action="store_true", help="print all keys as the page docs/keys.md")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command; returns 0."""
    arguments = parse(command_parser(), argv)
    from fp8moe.cli.key_table import key_table

    if arguments.markdown:
        print(page(key_table()), end="")
        return 0
    word = " ".join(arguments.word)
    width = max(60, min(120, shutil.get_terminal_size().columns))
    print(found_text(word, key_table(), width) if word else all_text(key_table(), width))
    return 0


def found_text(word: str, keys: Sequence[Key], width: int) -> str:
    """The keys that `word` finds; else the nearest names. Raises ConfigError where nothing is near."""
    from fp8moe.cli.key_names import ALIASES, advice_for

    found = search(word, keys)
    said = advice_for(word)
    if said is not None:
        target = ALIASES.get(word.lower().replace("-", "_"))
        found = [*(key for key in keys if key.name == target), *(key for key in found if key.name != target)]
        return "\n".join([f"{word} is not a key: {said}", *(entry(key, width) for key in found)])
    if found:
        return "\n".join(entry(key, width) for key in found)
    names = {key.name.rpartition(".")[2]: key for key in keys} | {key.name: key for key in keys}
    near = dict.fromkeys(names[name] for name in get_close_matches(word.lower().replace(" ", "_"), names, 5, 0.5))
    if not near:
        raise ConfigError(f"no key has {word!r:.60} in its name or meaning: fp8moe keys lists all {len(keys)}")
    return "\n".join(
        [f"no key has {word!r:.60} in its name or meaning; the nearest:", *(entry(key, width) for key in near)]
    )


def search(word: str, keys: Iterable[Key]) -> list[Key]:
    """The keys with `word` in them, best first: as the whole name or its last part, inside the name, in the meaning."""
    plain = word.lower()
    name = plain.replace(" ", "_").replace("-", "_")
    words = [re.compile(rf"\b{re.escape(part)}") for part in plain.split()]

    def rank(key: Key) -> int:
        if name in (key.name, key.name.rpartition(".")[2]):
            return 0
        text = f"{key.name} {key.meaning}".lower()
        return 1 if name in key.name else 2 if all(part.search(text) for part in words) else 3

    return sorted((key for key in keys if rank(key) < 3), key=rank)


def entry(key: Key, width: int) -> str:
    """A key for a terminal: name, default and type, and below them the meaning."""
    default = f"={key.default}" if key.default else "  (must be set)"
    only = f"; of kind={key.kind} alone" if key.kind else ""
    head = f"{key.name}{default}   {key.type}{only}"
    return f"{head}\n{textwrap.fill(key.meaning, width, initial_indent='    ', subsequent_indent='    ')}"


def all_text(keys: Sequence[Key], width: int) -> str:
    """All keys, group by group, and behind them the groups that are chosen by name."""
    groups = "\n".join(f"{name}=NAME   one of {', '.join(names)}" for name, names in choices().items())
    return "\n".join([*(entry(key, width) for key in keys), "", "Groups, chosen by name:", groups])


def choices() -> dict[str, list[str]]:
    """The files of each group of configs/."""
    from fp8moe.cli.compose import CONFIGS, config_groups

    return {group: sorted(path.stem for path in (CONFIGS / group).glob("*.yaml")) for group in sorted(config_groups())}


def page(keys: Sequence[Key]) -> str:
    """docs/keys.md: a table a group."""
    named = choices()
    lines = [PAGE]
    for group in dict.fromkeys(key.group for key in keys):
        lines.append(f"## {group or 'The run'}\n")
        if group in named:
            lines.append(f"`{group}=NAME`, NAME one of {', '.join(f'`{name}`' for name in named[group])}.\n")
        lines += ["| Key | Type and range | Default | Meaning |", "|---|---|---|---|"]
        lines += [_row(key) for key in keys if key.group == group]
        lines.append("")
    rest = [group for group in named if group not in {key.group for key in keys}]
    lines.append("## Groups without keys of their own\n")
    lines += [f"- `{group}=NAME`: {', '.join(f'`{name}`' for name in named[group])}" for group in rest]
    return "\n".join(lines) + "\n"


def _row(key: Key) -> str:
    kind = f" (`kind={key.kind}` alone)" if key.kind else ""
    default = f"`{key.default}`" if key.default else ""
    cells = (f"`{key.name}`", f"{key.type}{kind}", default, key.meaning)
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"
