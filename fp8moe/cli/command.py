"""Shared by all commands: the argument parser, and an exception's exit code and sentence.

A mistake on the command line is a ConfigError of one sentence: the parser raises it in place of argparse's usage text.

Most failures carry their exit code (`fp8moe.errors`). The others are classified here: a plain `ValueError` is a
configuration that can't work, a failed allocation is memory, an OSError that names a file is data or a full disk, a
collective that timed out is a hang. A collective that
failed because a peer closed its connection is SECONDARY: the peer is the cause, and its own error is reported first.
Anything else is a defect of this program and is shown with its traceback.
"""

from __future__ import annotations

import argparse
import errno
import re
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from fp8moe.errors import EXIT, LOST_PEER_PHRASES, ConfigError, SpaceError, is_out_of_memory

# Parts of the messages of gloo, NCCL and the store, lower case: they raise RuntimeErrors that have no codes.
COLLECTIVE_WORDS = ("gloo", "nccl", "store", "process group", "recv operation", "send operation", "barrier")
TIMEOUT_WORDS = ("timed out", "timeout")
SOURCE_LOCATION = re.compile(r"\[[^\]]*:\d+\]\s*")  # the file and line of C++ code that a message begins with


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one sentence, raised as ConfigError."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def make_parser(name: str, description: str, *, settings: bool = False) -> Parser:
    """The parser of `fp8moe NAME`; `settings` adds the key=value arguments of a run."""
    parser = Parser(
        prog=f"fp8moe {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if settings:
        parser.add_argument(
            "settings", nargs="*", default=[], metavar="key=value", help="settings of the run, as in fp8moe train"
        )
    return parser


def add_graphs(parser: argparse._ActionsContainer) -> None:
    """The argument by which a command that generates takes CUDA graphs."""
    parser.add_argument(
        "--cuda-graphs",
        action="store_true",
        help="on a GPU: forwards behind the prompts are CUDA graphs, of which the host launches each at once",
    )


def parse(parser: Parser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse `argv`; options may stand before, between and after settings. Raises ConfigError with one sentence."""
    _refuse_settings_as_options(parser, argv)
    _refuse_unknown_options(parser, argv)
    return parser.parse_intermixed_args(list(argv))


def _refuse_settings_as_options(parser: Parser, argv: Sequence[str]) -> None:
    """Raise ConfigError where a setting is typed as an option: `--steps 20`, `--steps=20`, `--lr 3e-4`."""
    if not any(action.dest == "settings" for action in parser._actions):
        return
    known = parser._option_string_actions
    for i, word in enumerate(argv):
        option, has_value, value = word.partition("=")
        if word == "--":
            return
        if not re.match(r"--?[A-Za-z]", option) or option in known:
            continue
        from fp8moe.cli.compose import keys_of  # loads torch: for this error alone
        from fp8moe.cli.key_names import setting_for
        from fp8moe.train.config import TrainConfig

        after = argv[i + 1] if i + 1 < len(argv) and re.match(r"-?[^-=][^=]*$", argv[i + 1]) else None
        if instead := setting_for(option, value if has_value else after, keys_of(TrainConfig)):
            raise ConfigError(f"{option} is no option, settings are key=value: {instead}")


def _refuse_unknown_options(parser: Parser, argv: Sequence[str]) -> None:
    """Raise ConfigError at an option that there is not, before the one that it stands for is missed."""
    known = parser._option_string_actions
    for word in argv:
        option = word.partition("=")[0]
        if word == "--":
            return
        if not re.match(r"--[A-Za-z]", option) or option in known:
            continue
        near = get_close_matches(option, [name for name in known if name.startswith("--")], 1)
        parser.error(f"unrecognized arguments: {option}{f', perhaps meant as {near[0]}' if near else ''}")


def check_file(option: str, path: Path, name: str) -> None:
    """Raise ConfigError, before any work, where the file that `option` names has no folder, or is one.

    name: that such a file may have.
    """
    if path.is_dir():
        raise ConfigError(f"{option}={path} is a directory and must be a file: use {option} {path / name}")
    if not path.parent.is_dir():
        wrong = "a file and must be a directory: use" if path.parent.exists() else "not there: make it, or use"
        raise ConfigError(f"{option}={path} is in {path.parent}, which is {wrong} another file")


@dataclass(frozen=True)
class Failure:
    """What a command reports of an exception.

    code: exit code. sentence: one line. traceback: "" unless it is a defect. secondary: a peer's failure is the cause.
    shared: every rank fails with the same sentence, so rank 0 alone prints it.
    """

    code: int
    sentence: str
    traceback: str = ""
    secondary: bool = False
    shared: bool = False


def explain(error: BaseException) -> Failure:
    """Classify `error` by its type and, where it has no code, by its message."""
    text = " ".join(str(error).split()) or type(error).__name__
    code = getattr(error, "exit_code", None)
    if isinstance(code, int):
        secondary = bool(getattr(error, "secondary", False))
        shared = bool(getattr(error, "shared", isinstance(error, ValueError | SpaceError)))
        return Failure(code, text, secondary=secondary, shared=shared)
    if is_out_of_memory(error):
        return Failure(EXIT["memory"], f"out of memory ({_first_sentence(text)}): lower batch.micro_batch or seq_len")
    if isinstance(error, RuntimeError):
        words = text.lower()
        collective = any(word in words for word in COLLECTIVE_WORDS)
        if collective and any(phrase in words for phrase in LOST_PEER_PHRASES):
            return Failure(
                1, f"a message failed because another process ended ({_first_sentence(text)})", secondary=True
            )
        if collective and any(word in words for word in TIMEOUT_WORDS):
            sentence = f"a message did not arrive within parallel.timeout ({_first_sentence(text)}): a rank hangs"
            return Failure(EXIT["hang"], sentence)
    is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)  # a write names no file
    if isinstance(error, OSError) and (is_full or error.filename is not None):
        reason = error.strerror or type(error).__name__
        code = EXIT["space"] if is_full else EXIT["data"]
        return Failure(code, f"{error.filename or 'a file'}: {reason}: check the path, its access and its disk")
    if isinstance(error, ValueError):
        return Failure(EXIT["configuration"], text, shared=True)
    return Failure(1, f"{type(error).__name__}: {text}", "".join(traceback.format_exception(error)))


def _first_sentence(text: str) -> str:
    return SOURCE_LOCATION.sub("", text).split(". ")[0][:200]
