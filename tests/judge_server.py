"""A vision-language server for the tests: a real HTTP server in a thread that answers as it is told."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image
from torch import Tensor

from tailorpo.images import from_pil
from tailorpo.rewards import VisionJudge

Answer = tuple[int, bytes | dict[str, Any], dict[str, str]] | dict[str, Any] | str
"""The text of an answer, the whole reply, or (status, reply, headers)."""


class JudgeServer:
    """What the tests see of the server: its address, what it was asked, and how it answers request number n."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.reply: Callable[[dict[str, Any], int], Answer] = lambda body, number: "7"
        self.lock = threading.Lock()

    def judge(self, **settings: Any) -> VisionJudge:
        return VisionJudge(url=self.url, model="tiny-vl", **{"retries": 0, "timeout": 5.0, **settings})


def says(text: str | None, **more: Any) -> dict[str, Any]:
    """The reply of a server whose answer is `text`."""
    return {"choices": [{"message": {"role": "assistant", "content": text}, **more}]}


def received(body: dict[str, Any]) -> tuple[Tensor, str]:
    """Picture and question of a request."""
    (message,) = body["messages"]
    picture, text = message["content"]
    head, _, data = picture["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    return from_pil(Image.open(io.BytesIO(base64.b64decode(data)))), text["text"]


@contextmanager
def judge_server() -> Iterator[JudgeServer]:
    """A server at a free port, until the end of the block."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                state.asked.append(body)
                state.headers.append(dict(self.headers))
                state.paths.append(self.path)
                number = len(state.asked)
            answer = state.reply(body, number)
            status, content, headers = answer if isinstance(answer, tuple) else (200, answer, {})
            content = says(content) if isinstance(content, str) else content
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            try:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                pass  # the client has gone, as the test of the timeout wants it to

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        state = JudgeServer(f"http://127.0.0.1:{running.server_port}/v1")
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield state
        finally:
            running.shutdown()
            thread.join()
