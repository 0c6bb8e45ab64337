"""A question to the job's store with a bound: its calls wait for good on a process that is frozen."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Answer = TypeVar("Answer")


def asked(question: Callable[[], Answer], seconds: float) -> Answer:
    """What `question` gives, on a thread that is left behind after `seconds`. RuntimeError then, or as it raises it."""
    answer: Future[Answer] = Future()

    def ask() -> None:
        try:
            answer.set_result(question())
        except RuntimeError as error:
            answer.set_exception(error)

    threading.Thread(target=ask, name="question to the store", daemon=True).start()
    try:
        return answer.result(seconds)
    except TimeoutError:
        raise RuntimeError(f"no answer within {seconds:g} s") from None
