"""`tailorpo serve-reward`: the rewards of a recipe as an HTTP service for the reward `remote`.

One request is computed at a time, because one reward on one device gains nothing from two; further requests wait. A
request is at most `LONGEST` bytes. A request of another type than `wire.CONTENT_TYPE` is refused, so that no page in a
browser on the same machine can make one.

Left out: batching over requests, and a key. Who can reach the address can ask.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast
from urllib.parse import unquote

import torch
from torch import Tensor

from tailorpo import __version__
from tailorpo._distributed import pick_device
from tailorpo.device import repeat_bits
from tailorpo.errors import TailorpoError, UserError
from tailorpo.rewards import RewardEntry, Scorer, load_scorer
from tailorpo.rewards.wire import CONTENT_TYPE, PROTOCOL, Question, encode_answer

LONGEST = 1 << 30
"""Bytes of a request: 85 float32 pictures of 1024 x 1024."""


class RewardService:
    """Rewards by name, each checked by a Scorer of its own and unweighted."""

    def __init__(self, entries: Sequence[RewardEntry], device: torch.device) -> None:
        """Load them, each on its own device or on the one given; RewardError if one cannot be."""
        # Under "skip" a score that is no number becomes NaN, and the run that asked decides what that means.
        loaded = load_scorer(entries, device, on_invalid="skip")
        self.device = device
        self.scorers = {
            name: Scorer([(reward, 1.0)], on_invalid="skip", devices=[placed or device])
            for name, (reward, _), placed in zip(loaded.names, loaded.members, loaded.devices, strict=True)
        }
        self._turn = threading.Lock()

    def facts(self) -> dict[str, Any]:
        """What a client has to know first."""
        rewards = {name: scorer.differentiable for name, scorer in self.scorers.items()}
        return {"protocol": PROTOCOL, "tailorpo": __version__, "rewards": rewards}

    def answer(self, name: str, body: bytes) -> bytes:
        """The answer to an encoded question; ValueError or a TailorpoError, in words, where there is none."""
        question = Question.decode(body)
        with self._turn:
            scores, gradient = self._score(self.scorers[name], question)
            return encode_answer(scores, gradient)

    def _score(self, scorer: Scorer, question: Question) -> tuple[Tensor, Tensor | None]:
        images = question.images.to(self.device).requires_grad_(question.gradient)
        score: Callable[[Tensor, Sequence[str]], Tensor] = scorer
        if question.time is not None:
            score = scorer.at(question.time)
        with torch.set_grad_enabled(question.gradient):
            scores = score(images, question.prompts)
        return scores, torch.autograd.grad(scores.sum(), images)[0] if question.gradient else None


class RewardServer(ThreadingHTTPServer):
    """Rewards at an address."""

    def __init__(self, service: RewardService, address: tuple[str, int]) -> None:
        self.service = service
        super().__init__(address, _Handler)

    @property
    def url(self) -> str:
        """For the run files of this machine."""
        host = str(self.server_address[0])
        return f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{self.server_address[1]}"


def announcement(server: RewardServer) -> str:
    """What is served where, and how a run file asks for it."""
    lines: list[str] = []
    for name, differentiable in server.service.facts()["rewards"].items():
        which = f", serves: {json.dumps(name)}" if len(server.service.scorers) > 1 else ""
        gradient = ", differentiable: true" if differentiable else ""
        lines.append(f'serving {name}: reward: {{name: remote, url: "{server.url}"{which}{gradient}}}')
    return "\n".join(lines)


def make_server(entries: Sequence[RewardEntry], *, host: str, port: int) -> RewardServer:
    """A server that has its rewards loaded and its port open; `serve_forever` it.

    Raises:
        UserError: a reward cannot be loaded, or the address is not free.
    """
    device = pick_device()
    repeat_bits(device)
    service = RewardService(entries, device)
    try:
        return RewardServer(service, (host, port))
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {host}:{port}: {error}; take another --host or --port") from error


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    timeout = 60.0  # of a client that stops in the middle of its request

    @property
    def rewards(self) -> RewardService:
        return cast(RewardServer, self.server).service

    def do_GET(self) -> None:
        if self.path == "/":
            self._send(200, json.dumps(self.rewards.facts()).encode(), "application/json")
        else:
            self._refuse(404, "ask GET / or POST /score/NAME")

    def do_POST(self) -> None:
        name, length = unquote(self.path.removeprefix("/score/")), self.headers.get("Content-Length", "")
        if not self.path.startswith("/score/") or name not in self.rewards.scorers:
            self._refuse(404, f"there is no {self.path}; the rewards are {', '.join(self.rewards.scorers)}")
        elif self.headers.get("Content-Type") != CONTENT_TYPE:
            self._refuse(415, f"the Content-Type has to be {CONTENT_TYPE}")
        elif not length.isdecimal() or int(length) > LONGEST:
            self._refuse(413, f"the Content-Length has to be at most {LONGEST}, not {length!r}")
        else:
            self._score(name, self.rfile.read(int(length)))

    def _score(self, name: str, body: bytes) -> None:
        try:
            answer = self.rewards.answer(name, body)
        except (TailorpoError, ValueError) as error:
            self._refuse(422, str(error))
        except Exception as error:  # out of memory, say: the client may ask again
            self._refuse(500, f"{type(error).__name__}: {error}")
        else:
            self._send(200, answer, CONTENT_TYPE)

    def _refuse(self, status: int, why: str) -> None:
        self.close_connection = True  # what was not read of the body would be taken for a request
        self._send(status, why.encode(), "text/plain; charset=utf-8")

    def _send(self, status: int, data: bytes, kind: str) -> None:
        try:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:  # the client is gone, and asks again if it wants to
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a line for each of thousands of requests helps nobody."""
