"""From an exception to an exit code and one sentence: the only place that knows both.

Most failures carry their code (`fp8moe.errors`). The rest are recognised here: a plain `ValueError` from below is a
configuration that can't work, an allocation that failed is memory, a collective that timed out is a hang. A collective
that failed because a peer's connection closed is SECONDARY: the peer is the cause, and whoever reports should look
there first. Anything else is a defect of this program and keeps its traceback.
"""

from __future__ import annotations

import re
import traceback
from dataclasses import dataclass

from fp8moe.errors import EXIT

# What gloo and NCCL say, lower case; they raise plain RuntimeErrors (or subclasses) and have no codes.
TIMEOUT_WORDS = ("timed out", "timeout")
LOST_PEER_WORDS = (
    "connection closed by peer",
    "connection reset by peer",
    "socket closed",
    "broken pipe",
    "remote peer",
)
SOURCE_PLACE = re.compile(r"\[[^\]]*:\d+\]\s*")  # where in somebody else's C++ it was thrown
COLLECTIVE_WORDS = ("gloo", "nccl", "tcpstore", "store", "process group", "recv operation", "send operation", "barrier")


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
        if collective and any(word in words for word in LOST_PEER_WORDS):
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
