"""What every command shares: its argument parser, and the exit code and sentence of an exception.

A mistake on the command line is a ConfigError of one sentence, like every other: the parsers here raise it instead of
argparse's usage text.

Most failures carry their code (`fp8moe.errors`). The rest are recognised here: a plain `ValueError` from below is a
configuration that can't work, an allocation that failed is memory, a collective that timed out is a hang. A collective
that failed because a peer's connection closed is SECONDARY: the peer is the cause, and whoever reports should look
there first. Anything else is a defect of this program and keeps its traceback.
"""

from __future__ import annotations

import argparse
import re
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from fp8moe.errors import EXIT, LOST_PEER_PHRASES, ConfigError

# What gloo and NCCL say, lower case; they raise plain RuntimeErrors (or subclasses) and have no codes.
TIMEOUT_WORDS = ("timed out", "timeout")
SOURCE_PLACE = re.compile(r"\[[^\]]*:\d+\]\s*")  # where in somebody else's C++ it was thrown
COLLECTIVE_WORDS = ("gloo", "nccl", "tcpstore", "store", "process group", "recv operation", "send operation", "barrier")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one sentence, raised as ConfigError."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def make_parser(name: str, description: str, *, settings: bool = False) -> Parser:
    """The parser of `fp8moe NAME`; `settings` adds the key=value arguments of a run, after which options may follow."""
    parser = Parser(
        prog=f"fp8moe {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if settings:
        parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of the run; see fp8moe train")
    return parser


def parse(parser: Parser, argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, with options before, between and after settings. Raises ConfigError for what is not legal."""
    return parser.parse_intermixed_args(list(argv))


@dataclass(frozen=True)
class Failure:
    """code: exit code. sentence: one line. traceback: "" when the sentence says all.

    secondary: a peer is the cause. shared: every rank finds the same by itself, so one of them may speak for all.
    """

    code: int
    sentence: str
    traceback: str = ""
    secondary: bool = False
    shared: bool = False


def explain(error: BaseException) -> Failure:
    """Classify `error`."""
    text = " ".join(str(error).split()) or type(error).__name__
    code = getattr(error, "exit_code", None)
    if isinstance(code, int):
        secondary = bool(getattr(error, "secondary", False))
        return Failure(code, text, secondary=secondary, shared=isinstance(error, ValueError))
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
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
    if isinstance(error, ValueError):
        return Failure(EXIT["configuration"], text, shared=True)
    return Failure(1, f"{type(error).__name__}: {text}", "".join(traceback.format_exception(error)))


def _is_out_of_memory(error: BaseException) -> bool:
    # By name: this module must not load torch for `fp8moe schedule --help`.
    if type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _first_sentence(text: str) -> str:
    return SOURCE_PLACE.sub("", text).split(". ")[0][:200]
