"""Requests to a reward on a server: retries with growing pauses, a refusal of redirections, and one error for all.

Tried again are 429, 5xx, a timeout and a lost connection; anything else is the server's last word.
"""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from typing import Any, TypeVar

_T = TypeVar("_T")
_LONGEST_PAUSE = 30.0


class NoAnswerError(Exception):
    """No answer that can be read, with "1 attempt" or "3 attempts" and what was said instead, in words."""

    def __init__(self, attempts: int, said: str) -> None:
        self.attempts = "1 attempt" if attempts == 1 else f"{attempts} attempts"
        self.said = said
        super().__init__(f"no answer after {self.attempts}: {said}")


class _StayHere(urllib.request.HTTPRedirectHandler):
    """A redirected POST would lose its body and carry the key to another server."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        """Refuse: the redirection becomes an HTTPError."""


def ask(
    request: urllib.request.Request,
    read: Callable[[bytes], _T],
    *,
    timeout: float,
    retries: int,
    stop: threading.Event | None = None,
) -> _T:
    """What `read` makes of the server's answer; it raises ValueError for one it cannot read.

    Args:
        request: sent as often as it takes.
        timeout: seconds per attempt.
        retries: further attempts.
        stop: once set, there are no further attempts.

    Raises:
        NoAnswerError: after the last attempt.
    """
    opener, stop = urllib.request.build_opener(_StayHere), stop or threading.Event()
    for attempt in range(1, retries + 2):
        pause = 0.25 * 2.0**attempt
        try:
            with opener.open(request, timeout=timeout) as response:
                return read(response.read())
        except urllib.error.HTTPError as error:
            said, again = f"{error.code} {error.reason}: {_body(error)}", error.code == 429 or error.code >= 500
            pause = _asked_pause(error.headers.get("Retry-After")) or pause
        except (OSError, HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            said, again = f"{type(reason).__name__}: {reason}" if isinstance(reason, Exception) else str(reason), True
        except ValueError as error:
            said, again = str(error), False
        if not again or attempt > retries or stop.wait(min(pause, _LONGEST_PAUSE)):
            raise NoAnswerError(attempt, said)
    raise AssertionError("the last attempt returns or raises")


def _body(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(2000).decode(errors="replace").strip()
    except (OSError, HTTPException):
        return "(and hung up)"


def _asked_pause(header: str | None) -> float | None:
    """Seconds of a Retry-After header; None without one, or where it is a date."""
    try:
        return None if header is None else max(0.0, float(header))
    except ValueError:
        return None
