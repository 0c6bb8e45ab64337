"""The failures a user can cause or must act on, and the exit code that each one ends the process with.

They carry no logic and import nothing, so any floor from `parallel` up may raise them; `kernels` and `layers` raise a
plain `ValueError`, which the door treats as a configuration error. A message is one sentence: the rule, both numbers,
and the nearest legal choice.
"""

from __future__ import annotations

EXIT: dict[str, int] = {
    "configuration": 2,
    "data": 3,
    "memory": 4,
    "nonfinite": 5,
    "hang": 6,
    "preempted": 75,
}


# How gloo and NCCL say that a peer is gone, lower case; they raise plain RuntimeErrors and have no codes.
LOST_PEER_PHRASES = ("closed by peer", "reset by peer", "broken pipe", "socket closed", "remote peer")


class ConfigError(ValueError):
    """A setting, or a combination of settings, that can't work."""

    exit_code: int = EXIT["configuration"]


class DataError(ValueError):
    """A corpus, an index or a tokenizer that is missing, broken or does not fit the model."""

    exit_code: int = EXIT["data"]


class NonFiniteError(RuntimeError):
    """The loss or a gradient stopped being a finite number."""

    exit_code: int = EXIT["nonfinite"]


class HangError(RuntimeError):
    """A rank made no progress within the time it was given. secondary: because another one had ended before it."""

    exit_code: int = EXIT["hang"]

    def __init__(self, message: str, *, secondary: bool = False) -> None:
        super().__init__(message)
        self.secondary = secondary


class ImbalanceError(RuntimeError):
    """More tokens chose the experts of one rank than a stated bound has room for."""

    exit_code: int = EXIT["memory"]
