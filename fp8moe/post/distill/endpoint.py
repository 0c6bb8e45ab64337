"""The teacher behind an OpenAI-compatible endpoint: vLLM, SGLang, or a service.

A request is one POST to /chat/completions or /completions, at most `concurrency` at a time, each on a thread of its
own. What another time may bring (no connection, a timeout, 429, 5xx, an answer that can't be read) is tried again after
`wait` seconds, doubled each time, a random share more, or after what Retry-After says if that is longer. A request that
has used up its tries fails alone if any other was answered since its first; if none was, the endpoint is down: requests
that were sent are waited for, no more are sent, and EndpointError is raised.

The key comes from an environment variable alone, and stands in no file, message or row.
"""

from __future__ import annotations

import os
import queue
import random
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fp8moe.errors import EXIT, ConfigError
from fp8moe.generate.decode import GenerationConfig
from fp8moe.limits import Range, check_fields, shown
from fp8moe.post.distill.http_json import RefusedError, TryAgainError, post_json
from fp8moe.post.distill.teacher import Failed, Reply, Request

Api = Literal["chat", "completions"]
ENDED = {"stop": "stop", "eos": "stop", "length": "max_tokens"}  # finish_reason -> ended; others are passed on


class EndpointError(RuntimeError):
    """The endpoint answers no more: begin again later."""

    exit_code: int = EXIT["preempted"]


@dataclass(frozen=True)
class EndpointConfig:
    """url: up to and with /v1. key_env: the variable that holds the key; none is sent where it is not set. tries: of a
    request. wait: seconds before the second one. timeout: seconds without a byte. body: added to each request; null
    takes a key out."""

    url: str
    model: str
    api: Api = "chat"
    key_env: str = "OPENAI_API_KEY"
    concurrency: int = 8
    tries: int = 6
    wait: float = 1.0
    timeout: float = 600.0
    body: Mapping | None = None

    def __post_init__(self) -> None:
        ranges = {
            "concurrency": Range(least=1, most=1024),
            "tries": Range(least=1, most=100),
            "wait": Range(least=0, most=600),
            "timeout": Range(above=0, most=86400, use="use 600"),
        }
        check_fields(self, "endpoint", **ranges)
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--endpoint={shown(self.url)} is no URL: use http://HOST:PORT/v1")
        if parts.username is not None or parts.password is not None or parts.query:
            raise ConfigError(
                "--endpoint must have no user, password or query, which would be written to files: put the key into "
                f"the environment variable {self.key_env}"
            )


class EndpointTeacher:
    """Answers requests by an endpoint; only one `replies` at a time."""

    def __init__(self, config: EndpointConfig, generation: GenerationConfig, stops: Sequence[str] = ()) -> None:
        self._config, self._generation, self._stops = config, generation, stops
        self._key = os.environ.get(config.key_env) or None
        if self._key is not None and not (self._key.isascii() and self._key.isprintable()):
            raise ConfigError(f"{config.key_env} has characters that no key has: set it to the key alone")
        path = "chat/completions" if config.api == "chat" else "completions"
        self._url = f"{config.url.rstrip('/')}/{path}"
        self._stop = threading.Event()
        self._answered = 0.0  # when a request was last answered
        self.identity: dict[str, Any] = {"teacher": "endpoint", "model": config.model, "api": config.api}
        self.identity |= {"body": dict(config.body)} if config.body else {}

    def replies(self, requests: Sequence[Request]) -> Iterator[Reply | Failed]:
        """As they come. Raises ConfigError where the endpoint refuses all, EndpointError where it answers no more; all
        answers that came are given out before."""
        todo, lock = iter(requests), threading.Lock()
        results: queue.Queue[Reply | Failed | Exception | None] = queue.Queue(2 * self._config.concurrency)
        abandoned = threading.Event()  # nobody takes results any more
        self._stop.clear()

        def work() -> None:
            while not self._stop.is_set():
                with lock:
                    request = next(todo, None)
                if request is None:
                    break
                try:
                    result: Reply | Failed | Exception | None = self._ask(request)
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

    def _ask(self, request: Request) -> Reply | Failed | None:
        """The answer to a request; None where the endpoint was given up before it was tried again."""
        reason, failing_since = "", None
        for number in range(self._config.tries):
            if number and self._stop.is_set():
                return None
            try:
                reply = self._reply(request, post_json(self._url, self._body(request), self._key, self._config.timeout))
            except TryAgainError as error:
                reason, failing_since = str(error), failing_since or time.monotonic()
                if number + 1 < self._config.tries:
                    pause = self._config.wait * 2**number * random.uniform(1, 1.25)
                    self._stop.wait(max(pause, error.after))
            except RefusedError as error:
                return self._refused(request, error)
            else:
                self._answered = time.monotonic()
                return reply
        assert failing_since is not None
        if self._answered > failing_since:
            return Failed(request, f"no answer in {self._config.tries} tries ({reason})", again=True)
        raise EndpointError(f"{self._config.url} gave no answer in {self._config.tries} tries ({reason})")

    def _refused(self, request: Request, error: RefusedError) -> Failed:
        """The sample that is refused; an error of the whole command where any request would be."""
        if error.code == 401:
            held = "does not hold a key it takes" if self._key else "holds no key"
            raise ConfigError(f"{self._config.url} refuses access ({error}): {self._config.key_env} {held}")
        if 300 <= error.code < 400:
            raise ConfigError(f"{self._url} leads elsewhere ({error}): name the URL that it leads to")
        if error.code in (403, 404, 405) and not self._answered:
            raise ConfigError(f"{self._url} refuses model {self._config.model} ({error}): check --endpoint and --model")
        self._answered = time.monotonic()
        return Failed(request, f"refused ({error})")

    def _body(self, request: Request) -> dict[str, Any]:
        sampling = self._generation.sampling
        body: dict[str, Any] = {"model": self._config.model}
        if self._config.api == "chat":
            body["messages"] = [dict(message) for message in request.messages]
        else:
            body["prompt"] = "\n\n".join(message["content"] for message in request.messages)
        body |= {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": self._generation.max_tokens,
        }
        body |= {"seed": request.draw} | ({"stop": list(self._stops)} if self._stops else {})
        body |= self._config.body or {}
        return {key: value for key, value in body.items() if value is not None}

    def _reply(self, request: Request, answer: Any) -> Reply:
        """The sample in an answer. Raises TryAgainError where there is none."""
        try:
            (choice, *_) = answer["choices"]
            message = choice["message"] if self._config.api == "chat" else {"content": choice["text"]}
            content = message.get("content")
            reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
            if not isinstance(reasoning, str) or (
                not isinstance(content, str) and (content is not None or not reasoning)
            ):
                raise TypeError("content")
            finish = choice.get("finish_reason") or "stop"
            usage = answer.get("usage") or {}
            counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise TryAgainError(f"an answer without a completion: {str(answer)[:80]}") from error
        prompt_tokens, tokens = (count if isinstance(count, int) else None for count in counts)
        return Reply(request, content or "", reasoning, ENDED.get(str(finish), str(finish)), prompt_tokens, tokens)


def _put(results: queue.Queue[Any], result: object, abandoned: threading.Event) -> None:
    """Hand a result over, unless nobody takes it any more."""
    while not abandoned.is_set():
        try:
            results.put(result, timeout=0.2)
            return
        except queue.Full:
            continue
