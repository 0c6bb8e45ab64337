"""A teacher: what answers requests with samples, wherever it runs.

Replies come in any order, one at a time, so that each can be verified and stored while others are computed. A request
that can't be answered is a Failed, and the rest goes on; a teacher that can't answer any more raises. What a request
draws depends on its `draw` alone: neither on the other requests nor on their order, so that an interrupted run ends
with the samples of one that was not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Form = Literal["short", "long"]
Messages = tuple[Mapping[str, str], ...]


@dataclass(frozen=True)
class Request:
    """Sample number `sample` of the prompt `prompt` (its id) in a form; messages: what the teacher is asked."""

    prompt: str
    form: Form
    sample: int
    messages: Messages
    draw: int = 0

    @property
    def key(self) -> tuple[str, Form, int]:
        """What tells it from all others."""
        return (self.prompt, self.form, self.sample)


@dataclass(frozen=True)
class Reply:
    """A sample. reasoning: what the teacher thought, where it says that apart. ended: "stop" unless it was cut. tokens:
    None where the teacher does not count them."""

    request: Request
    text: str
    reasoning: str = ""
    ended: str = "stop"
    prompt_tokens: int | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class Failed:
    """A request without a sample, and why, in a short sentence. again: another time may bring it."""

    request: Request
    reason: str
    again: bool = False


class Teacher(Protocol):
    """Answers requests; `identity` says who it is, in every row: samples of different identities are never mixed."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """`teacher`, `model`, and what else decides its samples."""
        ...

    def replies(self, requests: Sequence[Request]) -> Iterator[Reply | Failed]:
        """An answer to every request, in any order."""
        ...


def draw_number(seed: int, prompt: str, form: Form, sample: int) -> int:
    """The number by which a request draws: 31 bits, which every server takes as a seed."""
    digest = hashlib.blake2b(f"{seed}/{prompt}/{form}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 33
