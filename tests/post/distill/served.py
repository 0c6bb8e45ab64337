"""An OpenAI-compatible endpoint on a thread of this process, whose answers a test decides."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, dict[str, str], Any]  # code, headers, body: JSON or bytes; code 0 closes the connection
Decide = Callable[[dict[str, Any], int], Answer]  # the request's body and its number


class Served:
    """url: of the endpoint. bodies, headers, paths: of the requests so far. most: of them that were in work at once."""

    def __init__(self, decide: Decide) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.most = self._now = 0
        self._lock = threading.Lock()
        served = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with served._lock:
                    number = len(served.bodies)
                    served.bodies.append(body)
                    served.headers.append(dict(self.headers))
                    served.paths.append(self.path)
                    served._now += 1
                    served.most = max(served.most, served._now)
                try:
                    code, headers, answer = decide(body, number)
                finally:
                    with served._lock:
                        served._now -= 1
                if code == 0:
                    self.connection.close()
                    return
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(code)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@contextlib.contextmanager
def served(decide: Decide) -> Iterator[Served]:
    """An endpoint while the block runs."""
    made = Served(decide)
    thread = threading.Thread(target=made.server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield made
    finally:
        made.server.shutdown()
        made.server.server_close()
        thread.join()


def chat(text: str | None, finish: str = "stop", tokens: int = 5, **message: Any) -> Answer:
    """A whole answer of chat/completions."""
    choice = {"message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
    return 200, {}, {"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": tokens}}


def right(body: dict[str, Any], number: int) -> Answer:
    """The sum that the last message asks for, `a+b`, and the seed."""
    first, second = body["messages"][-1]["content"].split("+")
    return chat(f"{body['seed']}\nAnswer: {int(first) + int(second)}")
