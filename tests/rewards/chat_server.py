"""A chat endpoint on loopback whose answers a test writes beforehand."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class ChatServer:
    """Remembers requests; `answer(body)` gives a text, or (status, headers, text), or seconds to stay silent."""

    def __init__(self, answer: Callable[[dict[str, Any]], Any]) -> None:
        self.answer = answer
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.most_at_once = self._now = 0
        self._lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                owner.serve(self)

            def log_message(self, *_: Any) -> None:
                """Silent."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            self.requests.append((handler.path, dict(handler.headers), body))
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        answer = self.answer(body)
        if isinstance(answer, float):
            time.sleep(answer)
            answer = "SCORE: 1"
        status, headers, text = answer if isinstance(answer, tuple) else (200, {}, reply(answer))
        with self._lock:
            self._now -= 1
        data = text.encode()
        try:
            handler.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(data)
        except OSError:
            return  # the client has gone


def reply(text: str) -> str:
    return json.dumps(
        {"choices": [{"message": {"content": text}}], "usage": {"prompt_tokens": 10, "completion_tokens": 3}}
    )


@contextmanager
def chat_server(answer: Callable[[dict[str, Any]], Any]) -> Iterator[ChatServer]:
    """A running server, ended with the block."""
    server = ChatServer(answer)
    thread = threading.Thread(target=server.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.server.shutdown()
        server.server.server_close()
        thread.join()
