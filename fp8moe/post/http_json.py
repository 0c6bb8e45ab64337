"""One POST of JSON over HTTP, by the standard library, and what its failure means: try again, or not.

Redirects are not followed: the key would go to wherever they lead. Refused: `requests` and `httpx`, which are no
dependencies and bring nothing that a POST with a timeout needs. Proxies are those of the environment.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any, NoReturn

AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # HTTP codes that another time may not bring
MOST_BYTES = 64 << 20  # of an answer
_MOST_WAIT = 600.0


class TryAgainError(Exception):
    """No answer, or one that can't be read; after: seconds that the server asks to wait."""

    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


class BadAnswerError(Exception):
    """An answer that lacks what was asked for, as every other of this server will."""


class RefusedError(Exception):
    """The server refuses this request, and would again; code: of HTTP."""

    def __init__(self, reason: str, code: int) -> None:
        super().__init__(reason)
        self.code = code


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


def post_json(url: str, body: Mapping[str, Any], key: str | None, timeout: float) -> Any:
    """The JSON that `url` answers; timeout: seconds without a byte. Raises TryAgainError or RefusedError."""
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")
    try:
        with _OPENER.open(request, timeout=timeout) as response:
            answer = response.read(MOST_BYTES + 1)
    except urllib.error.HTTPError as error:
        with error:
            _raise(error, key)
    except (OSError, http.client.HTTPException) as error:  # URLError and TimeoutError are OSErrors
        raise TryAgainError(_words(getattr(error, "reason", None) or error)) from error
    if len(answer) > MOST_BYTES:
        raise RefusedError(f"an answer of more than {MOST_BYTES >> 20} MB", 200)
    try:
        return json.loads(answer)
    except ValueError as error:
        raise TryAgainError(f"an answer that is not JSON: {answer[:80]!r}") from error


def _raise(error: urllib.error.HTTPError, key: str | None) -> NoReturn:
    try:
        said = error.read(4096).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        said = ""
    said = " ".join(said.split())[:200]
    reason = f"HTTP {error.code} {error.reason}" + (f": {said}" if said else "")
    if key:
        reason = reason.replace(key, "***")
    if error.code in AGAIN:
        raise TryAgainError(reason, _retry_after(error.headers.get("Retry-After"))) from None
    raise RefusedError(reason, error.code) from None


def _retry_after(text: str | None) -> float:
    """Seconds of a Retry-After header, a number or a date; 0 without one that can be read."""
    if not text:
        return 0.0
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except ValueError:
            return 0.0
    return min(seconds, _MOST_WAIT) if seconds > 0 else 0.0


def _words(error: object) -> str:
    if isinstance(error, TimeoutError):
        return "no byte within the timeout"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
