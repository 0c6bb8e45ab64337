"""Requests to an OpenAI-compatible server, vLLM, SGLang or a service: of a teacher (`distill`), of rollouts (`grpo`).

A request is one POST of JSON, at most `concurrency` at a time, each on a thread of its own. What another time may bring
(no connection, a timeout, 429, 5xx, an answer that can't be read) is tried again after `wait` seconds, doubled each
time, a random share more, or after what Retry-After says if that is longer. A request that has used up its tries fails
alone if any other was answered since its first; if none was, the server is down: requests that were sent are waited
for, no more are sent, and EndpointError is raised.

The key comes from an environment variable alone, and stands in no file, message or row.
"""

from __future__ import annotations

import os
import queue
import random
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from fp8moe.errors import EXIT, ConfigError
from fp8moe.limits import Range, check_fields, shown
from fp8moe.post.http_json import BadAnswerError, RefusedError, TryAgainError, post_json

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


class EndpointError(RuntimeError):
    """The endpoint answers no more: begin again later."""

    exit_code: int = EXIT["preempted"]
    shared = True


@dataclass(frozen=True)
class EndpointConfig:
    """url: up to and with /v1. key_env: the variable that holds the key; none is sent where it is not set. tries: of a
    request. wait: seconds before the second one. timeout: seconds without a byte. url_key, model_key: what the user
    calls the two, for messages."""

    url: str
    model: str
    key_env: str = "OPENAI_API_KEY"
    concurrency: int = 8
    tries: int = 6
    wait: float = 1.0
    timeout: float = 600.0
    url_key: str = "--endpoint"
    model_key: str = "--model"

    def __post_init__(self) -> None:
        ranges = {
            "concurrency": Range(least=1, most=1024),
            "tries": Range(least=1, most=100),
            "wait": Range(least=0, most=600),
            "timeout": Range(above=0, most=86400, use="use 600"),
        }
        check_fields(self, "endpoint", **ranges)
        check_url(self.url_key, self.url, self.key_env, "http://HOST:PORT/v1")


def check_url(name: str, url: str, key_env: str, example: str) -> None:
    """Raise ConfigError unless `url`, which the user calls `name`, is one that may be written to files."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{name}={shown(url)} is no URL: use {example}")
    if parts.username is not None or parts.password is not None or parts.query:
        raise ConfigError(
            f"{name} must have no user, password or query, which would be written to files: put the key into "
            f"the environment variable {key_env}"
        )


def read_key(key_env: str) -> str | None:
    """The key that an environment variable holds, if it does. Raises ConfigError."""
    key = os.environ.get(key_env) or None
    if key is not None and not (key.isascii() and key.isprintable()):
        raise ConfigError(f"{key_env} has characters that no key has: set it to the key alone")
    return key


@dataclass(frozen=True)
class Failure:
    """Why a request has no answer, in a short sentence. again: another time may bring it."""

    reason: str
    again: bool = False


class Endpoint:
    """A server at config.url; only one `answers` at a time. path: behind the URL, "chat/completions"."""

    def __init__(self, config: EndpointConfig, path: str) -> None:
        self._config, self._key = config, read_key(config.key_env)
        self._url = f"{config.url.rstrip('/')}/{path}"
        self._stop = threading.Event()
        self._answered = 0.0  # when a request was last answered

    def answers(
        self,
        requests: Sequence[Asked],
        body: Callable[[Asked], Mapping[str, Any]],
        read: Callable[[Asked, Any], Answer],
    ) -> Iterator[tuple[Asked, Answer | Failure]]:
        """Each request with its answer, as they come.

        body: what is sent. read: what an answer's JSON says; it raises TryAgainError where it says nothing, and
        BadAnswerError where no answer of this server will. Raises ConfigError where the endpoint refuses all or gives
        bad answers, EndpointError where it answers no more; all answers that came are given out before.
        """
        todo, lock = iter(requests), threading.Lock()
        results: queue.Queue[Any] = queue.Queue(2 * self._config.concurrency)
        abandoned = threading.Event()  # nobody takes results any more
        self._stop.clear()

        def work() -> None:
            while not self._stop.is_set():
                with lock:
                    request = next(todo, None)
                if request is None:
                    break
                try:
                    answer: Any = self._ask(body(request), partial(read, request))
                    result: Any = None if answer is None else (request, answer)
                except Exception as error:
                    self._stop.set()
                    result = error
                if result is not None:
                    _put(results, result, abandoned)
            _put(results, None, abandoned)

        workers = [
            threading.Thread(target=work, name=f"request-{i}", daemon=True)  # Ctrl-C waits for no timeout
            for i in range(min(self._config.concurrency, len(requests)))
        ]
        for worker in workers:
            worker.start()
        working, failure = len(workers), None
        try:
            while working:
                result = results.get()
                if result is None:
                    working -= 1
                elif isinstance(result, Exception):
                    failure = failure or result
                else:
                    yield result
        finally:
            self._stop.set()
            abandoned.set()
        if failure is not None:
            raise failure

    def _ask(self, body: Mapping[str, Any], read: Callable[[Any], Any]) -> Any:
        """What `read` makes of the answer, or a Failure; None where the endpoint was given up before another try."""
        reason, failing_since = "", None
        for number in range(self._config.tries):
            if number and self._stop.is_set():
                return None
            try:
                answer = read(post_json(self._url, body, self._key, self._config.timeout))
            except BadAnswerError as error:
                raise ConfigError(f"{self._url} {error}") from error
            except TryAgainError as error:
                reason, failing_since = str(error), failing_since or time.monotonic()
                if number + 1 < self._config.tries:
                    pause = self._config.wait * 2**number * random.uniform(1, 1.25)
                    self._stop.wait(max(pause, error.after))
            except RefusedError as error:
                return self._refused(error)
            else:
                self._answered = time.monotonic()
                return answer
        assert failing_since is not None
        if self._answered > failing_since:
            return Failure(f"no answer in {self._config.tries} tries ({reason})", again=True)
        raise EndpointError(f"{self._config.url} gave no answer in {self._config.tries} tries ({reason})")

    def _refused(self, error: RefusedError) -> Failure:
        """The request that is refused; an error of the whole command where any request would be."""
        config = self._config
        if error.code == 401:
            held = "does not hold a key it takes" if self._key else "holds no key"
            raise ConfigError(f"{config.url} refuses access ({error}): {config.key_env} {held}")
        if 300 <= error.code < 400:
            raise ConfigError(f"{self._url} leads elsewhere ({error}): name the URL that it leads to")
        if error.code in (403, 404, 405) and not self._answered:
            raise ConfigError(
                f"{self._url} refuses model {config.model} ({error}): check {config.url_key} and {config.model_key}"
            )
        self._answered = time.monotonic()
        return Failure(f"refused ({error})")


def _put(results: queue.Queue[Any], result: object, abandoned: threading.Event) -> None:
    """Hand a result over, unless nobody takes it any more."""
    while not abandoned.is_set():
        try:
            results.put(result, timeout=0.2)
            return
        except queue.Full:
            continue
