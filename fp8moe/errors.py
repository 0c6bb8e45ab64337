"""Errors that a user can cause or must act on, and the exit code of each.

They import nothing, so any floor from `parallel` up may raise them; `kernels` and `layers` raise a plain `ValueError`,
which `__main__` treats as a configuration error. A message is one sentence: the rule, both numbers, and the nearest
legal choice.
"""

from __future__ import annotations

EXIT: dict[str, int] = {
    "configuration": 2,
    "data": 3,
    "memory": 4,
    "nonfinite": 5,
    "hang": 6,
    "space": 7,
    "preempted": 75,  # EX_TEMPFAIL of sysexits.h: begin again later
}

# Parts of the messages, lower case, by which gloo and NCCL report a lost peer: they raise RuntimeErrors without codes.
LOST_PEER_PHRASES = ("closed by peer", "reset by peer", "broken pipe", "socket closed", "remote peer")


class ConfigError(ValueError):
    """A setting, or a combination of settings, that can't work."""

    exit_code: int = EXIT["configuration"]


class DataError(ValueError):
    """A corpus, an index or a tokenizer that is missing, broken or does not fit the model."""

    exit_code: int = EXIT["data"]


class SpaceError(RuntimeError):
    """A disk has less free space than a run will need."""

    exit_code: int = EXIT["space"]


class PreemptedError(RuntimeError):
    """A signal ended the run early, its state saved: starting it again goes on. All ranks say the same sentence."""

    exit_code: int = EXIT["preempted"]
    shared = True


class NonFiniteError(RuntimeError):
    """The loss, a gradient or the state of a run stopped being a finite number, or the loss left its course.

    All ranks find it together and say the same sentence.
    """

    exit_code: int = EXIT["nonfinite"]
    shared = True


class ReplicaError(RuntimeError):
    """Ranks that hold the same numbers hold different bits, or one computation done twice gave two results.

    All ranks say the same sentence.
    """

    exit_code: int = EXIT["nonfinite"]
    shared = True


class HangError(RuntimeError):
    """A rank made no progress within its timeout. secondary: because another rank had ended before."""

    exit_code: int = EXIT["hang"]

    def __init__(self, message: str, *, secondary: bool = False) -> None:
        super().__init__(message)
        self.secondary = secondary


class OutOfMemoryError(RuntimeError):
    """A rank's memory ran out; the message says what it held."""

    exit_code: int = EXIT["memory"]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is a failed allocation, of Python or of torch: by name, since this module loads no torch."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


class ImbalanceError(RuntimeError):
    """One rank's experts were chosen by more tokens than the configured bound allows."""

    exit_code: int = EXIT["memory"]
