"""A small client for OpenAI-compatible chat endpoints: one question, one answer, with time limits and retries.

The key is sent to the configured address only: redirects are not followed, and no error message contains the key.
"""

from __future__ import annotations

import http.client
import json
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_MAX_BYTES = 4 * 2**20
_RETRIED_STATUS = (408, 409, 425, 429, 500, 502, 503, 504)
_FIRST_WAIT = 0.5
_LONGEST_WAIT = 30.0


class ChatFault(Exception):
    """The endpoint gave no answer. `final`: a retry would not help. `wait`: seconds that the server asks to wait."""

    def __init__(self, message: str, *, final: bool = False, wait: float | None = None) -> None:
        super().__init__(message)
        self.final, self.wait = final, wait
        self.retries = 0


@dataclass(frozen=True)
class ChatAnswer:
    """The text of an answer and its cost. Token counts come from the server; 0 if it reports none."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    retries: int


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Refuses redirects, because a redirect would send the key to another address."""

    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass
class ChatClient:
    """Asks one model at one address. May be used from several threads at a time."""

    base_url: str
    """Up to and without `/chat/completions`, e.g. http://127.0.0.1:8000/v1."""
    model: str
    key: str | None = field(default=None, repr=False)
    max_tokens: int = 512
    timeout_s: float = 60.0
    """Seconds for one attempt, from its start to the last byte."""
    max_retries: int = 3
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        self._opener = urllib.request.build_opener(_NoRedirects)

    @property
    def identity(self) -> tuple[str, str, int]:
        """The settings that an answer depends on, in addition to the question."""
        return (self.base_url, self.model, self.max_tokens)

    def ask(self, text: str) -> ChatAnswer:
        """The answer to one user message, at temperature 0. Raises ChatFault after the last retry.

        The wait between attempts doubles from half a second to 30 s, with a random part. If the server sends
        Retry-After, that time is used, up to 30 s.
        """
        for attempt in range(self.max_retries + 1):
            try:
                return self._attempt(text, attempt)
            except ChatFault as fault:
                fault.retries = attempt
                if fault.final or attempt == self.max_retries:
                    raise
                usual = _FIRST_WAIT * 2**attempt * random.uniform(0.75, 1.25)
                self.sleep(min(_LONGEST_WAIT, usual if fault.wait is None else max(0.0, fault.wait)))
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _attempt(self, text: str, retries: int) -> ChatAnswer:
        deadline = time.monotonic() + self.timeout_s
        try:
            with self._opener.open(self._request(text), timeout=self.timeout_s) as response:
                body = _read(response, deadline)
        except urllib.error.HTTPError as error:
            with error:
                raise self._status_fault(error) from None
        except TimeoutError as error:
            raise ChatFault(f"no answer within {self.timeout_s:g} s") from error
        except urllib.error.URLError as error:
            reason = error.reason
            if isinstance(reason, TimeoutError):
                raise ChatFault(f"no answer within {self.timeout_s:g} s") from None
            raise ChatFault(f"{self.base_url} cannot be reached: {reason}") from None
        except (OSError, http.client.HTTPException) as error:
            raise ChatFault(f"the connection broke: {type(error).__name__}") from None
        return _answer(body, retries)

    def _request(self, text: str) -> urllib.request.Request:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        headers = {"Content-Type": "application/json"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        url = self.base_url.rstrip("/") + "/chat/completions"
        return urllib.request.Request(url, json.dumps(body).encode(), headers)

    def _status_fault(self, error: urllib.error.HTTPError) -> ChatFault:
        try:
            detail = error.read(2000).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            detail = ""
        if self.key:  # some servers quote the request
            detail = detail.replace(self.key, "[key]")
        wait = error.headers.get("Retry-After") if error.headers else None
        seconds = float(wait) if wait is not None and wait.replace(".", "", 1).isdigit() else None
        text = f"HTTP {error.code} {' '.join(detail.split())[:300]}".strip()
        return ChatFault(text, final=error.code not in _RETRIED_STATUS, wait=seconds)


def _read(response: Any, deadline: float) -> bytes:
    """The body, read in pieces with a deadline, so that a slow server cannot block the caller."""
    parts, size = [], 0
    while part := response.read1(65536):
        parts.append(part)
        size += len(part)
        if size > _MAX_BYTES:
            raise ChatFault("the answer is longer than 4 MiB", final=True)
        if time.monotonic() > deadline:
            raise TimeoutError
    return b"".join(parts)


def _answer(body: bytes, retries: int) -> ChatAnswer:
    try:
        data = json.loads(body)
        text = data["choices"][0]["message"]["content"]
        usage = data.get("usage") or {}
        counts = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise ChatFault(f"not an answer of a chat endpoint: {body[:200]!r}") from None
    if not isinstance(text, str):
        raise ChatFault("the answer has no text")
    return ChatAnswer(text, counts[0], counts[1], retries)
