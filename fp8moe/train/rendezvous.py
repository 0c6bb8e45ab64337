"""How the ranks of a run find each other: the variables of torchrun, checked, and the store of rank 0.

RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT (LOCAL_RANK and LOCAL_WORLD_SIZE too, where set) are checked before torch
reads them. Then rank 0 tries whether the port is free, and the others wait for a listener there, before torch's store
is asked: torch would fill the screen with C++ lines first. What torch still writes, of another kind of server that
listens there, is kept back and shown only where no sentence says it. The store is made on a thread, because torch waits
without an end for a port that accepts a connection and never answers. Each error is one sentence of every rank that
meets it: rank 0 may not exist, or be on another machine.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from fp8moe.errors import ConfigError
from fp8moe.train.interfaces import unreached, wrong_interface

RESOLVE_SECONDS = 60.0  # a name may be new to the machine, on clusters that make one for each job
GRACE = 5.0  # seconds that torch may take beyond its own timeout
NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
_LATE = re.compile(r"(\d+)/\d+ clients joined")


class RendezvousError(ConfigError):
    """The ranks can't find each other; a rank says so for itself."""

    shared = False


@dataclass(frozen=True)
class Place:
    """This process among all: its rank of world_size, and where rank 0 listens ("" and 0 for a single process)."""

    rank: int
    world_size: int
    address: str
    port: int


def place(environ: Mapping[str, str]) -> Place:
    """This process by the environment. Raises RendezvousError where a variable is missing, no number, or out of range.

    Without RANK it is alone.
    """
    if "RANK" not in environ:
        if environ.get("WORLD_SIZE", "1").strip() not in ("", "1"):
            raise RendezvousError(
                f"WORLD_SIZE={environ['WORLD_SIZE']} is set and RANK is not: set RANK for each process, as torchrun "
                "does, or unset WORLD_SIZE"
            )
        return Place(0, 1, "", 0)
    numbers = {name: _number(name, environ[name]) for name in NUMBERS if name in environ}
    _need(environ, "WORLD_SIZE")
    for index, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if size in numbers and numbers[size] < 1:
            raise RendezvousError(f"{size}={numbers[size]} must be at least 1: set the number of processes")
        if index in numbers and size in numbers and numbers[index] >= numbers[size]:
            raise RendezvousError(
                f"{index}={numbers[index]} must be below {size}={numbers[size]}: count from 0 to {numbers[size] - 1}"
            )
    if numbers["WORLD_SIZE"] == 1:
        return Place(0, 1, "", 0)
    _need(environ, "MASTER_ADDR", "MASTER_PORT")
    if not 1 <= numbers["MASTER_PORT"] <= 65535:
        raise RendezvousError(f"MASTER_PORT={numbers['MASTER_PORT']} must be from 1 to 65535: use 29500")
    return Place(numbers["RANK"], numbers["WORLD_SIZE"], environ["MASTER_ADDR"].strip(), numbers["MASTER_PORT"])


def meet(timeout: timedelta) -> tuple[dist.Store, Place]:
    """The store that all ranks share. Raises RendezvousError where they do not find each other within `timeout`."""
    here, seconds = place(os.environ), timeout.total_seconds()
    deadline = time.monotonic() + seconds
    with _without_torchs_lines():
        return _store(here, timeout, deadline, seconds), here


def _store(here: Place, timeout: timedelta, deadline: float, seconds: float) -> dist.Store:
    if here.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        _check_free(here.port)
        _resolve(here, deadline)
    else:
        _wait_for_listener(here, deadline, seconds)
    found: list[Any] = []
    thread = threading.Thread(target=_make_store, args=(found, timeout), name="rendezvous", daemon=True)
    thread.start()
    thread.join(max(0.0, deadline - time.monotonic()) + GRACE)
    if not found:
        raise _no_answer(here, seconds, "what listens there answers nothing")
    if isinstance(found[0], Exception):
        raise _explained(found[0], here, seconds) from found[0]
    store: dist.Store = found[0]
    return store


@contextlib.contextmanager
def connecting(here: Place, *, nccl: bool) -> Iterator[None]:
    """Around the making of the first group: an interface that is wrong is a RendezvousError. nccl: GPUs are used."""
    if (wrong := wrong_interface(here.address, here.port, nccl=nccl)) is not None:
        raise RendezvousError(wrong)
    with _without_torchs_lines():
        try:
            yield
        except RuntimeError as error:
            if (sentence := unreached(error, here.address, here.port)) is None:
                raise
            raise RendezvousError(sentence) from error


@contextlib.contextmanager
def _without_torchs_lines() -> Iterator[None]:
    """Keep what C++ code writes to stderr in the block; it is shown behind it, unless a RendezvousError says it all.

    Python's own stderr stays: a signal may end the process here, with a sentence.
    """
    sys.stderr.flush()
    with tempfile.TemporaryFile() as kept, os.fdopen(os.dup(2), "w", buffering=1) as terminal:
        os.dup2(kept.fileno(), 2)
        explained = False
        try:
            with contextlib.redirect_stderr(terminal):
                yield
        except RendezvousError:
            explained = True
            raise
        finally:
            os.dup2(terminal.fileno(), 2)
            kept.seek(0)
            if not explained and (text := kept.read()):
                os.write(2, text)


def _make_store(found: list[Any], timeout: timedelta) -> None:
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        store.set_timeout(timeout)
        found.append(store)
    except Exception as error:
        found.append(error)


def _number(name: str, text: str) -> int:
    if not re.fullmatch(r"\s*\d{1,10}\s*", text, re.ASCII):
        raise RendezvousError(f"{name}={text!r} must be a whole number of at least 0: set it as torchrun does")
    return int(text)


def _need(environ: Mapping[str, str], *names: str) -> None:
    missing = [name for name in names if not environ.get(name, "").strip()]
    if missing:
        raise RendezvousError(
            f"RANK={environ['RANK']} is set and {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not: "
            "set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each process, as torchrun does, or none of them"
        )


def _check_free(port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("", port))
        except OSError as error:
            raise _not_listening(port, error) from error


def _not_listening(port: int, error: OSError) -> RendezvousError:
    if error.errno == errno.EADDRINUSE:
        return RendezvousError(
            f"MASTER_PORT={port} is in use on this machine and rank 0 must listen there: set another port on all "
            "ranks, or end the process that has it"
        )
    return RendezvousError(
        f"rank 0 must listen at MASTER_PORT={port} and may not ({error.strerror}): set a port above 1023 on all ranks"
    )


def _wait_for_listener(here: Place, deadline: float, seconds: float) -> None:
    """Return when something listens where rank 0 should."""
    _resolve(here, deadline)
    while True:
        try:
            socket.create_connection((here.address, here.port), timeout=max(0.1, min(5.0, seconds))).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                reason = "nothing answered" if isinstance(error, TimeoutError) else str(error.strerror)
                raise _no_answer(here, seconds, reason) from error
        time.sleep(0.2)


def _resolve(here: Place, deadline: float) -> None:
    """Return when this machine knows the address of rank 0."""
    until = min(deadline, time.monotonic() + RESOLVE_SECONDS)
    while True:
        try:
            socket.getaddrinfo(here.address, here.port)
            return
        except (socket.gaierror, UnicodeError) as error:
            if time.monotonic() > until:
                reason = "it is no name" if isinstance(error, UnicodeError) else error.strerror
                raise RendezvousError(
                    f"MASTER_ADDR={here.address} is not known to this machine ({reason}): set the name or address of "
                    "the machine that runs rank 0"
                ) from error
        time.sleep(0.2)


def _no_answer(here: Place, seconds: float, reason: str) -> RendezvousError:
    return RendezvousError(
        f"rank 0 was not reached at MASTER_ADDR={here.address} MASTER_PORT={here.port} within "
        f"parallel.startup_timeout={seconds:g} seconds ({reason}): start rank 0 there, or set its address and port"
    )


def _explained(error: Exception, here: Place, seconds: float) -> Exception:
    text = " ".join(str(error).split())
    if "EADDRINUSE" in text:  # taken since it was tried
        return _not_listening(here.port, OSError(errno.EADDRINUSE, ""))
    if joined := _LATE.search(text):
        return RendezvousError(
            f"{joined[1]} of WORLD_SIZE={here.world_size} ranks came to MASTER_PORT={here.port} within "
            f"parallel.startup_timeout={seconds:g} seconds: start all of them, with rank 0's address and port"
        )
    if isinstance(error, dist.DistNetworkError | dist.DistStoreError):
        answers = "timed out" if "timed out" in text.lower() else "what listens there is no rank 0"
        return _no_answer(here, seconds, answers)
    return error
