"""A reward that another process computes: `tailorpo serve-reward` there, this here.

    score(x) = the server's,      d score / d x = the vector-Jacobian product that the server sends along

So the reward can be on a machine or a GPU of its own, in an environment of its own, and several trainings can share
it. The pictures travel as float32 and the scores come back as float32 (`wire`), which makes a run with a remote reward
the same, bit for bit, as one that computes it itself on equal hardware. Nothing is rounded, and nothing is a pickle.

The gradient is asked for together with the score, because the server forgets the graph; this uses that a picture's
score depends on no other picture, as every reward has to have it.

Left out: authentication and encryption (the server listens on 127.0.0.1 unless told otherwise; take an SSH tunnel), and
several servers behind one name.
"""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeVar
from urllib.parse import quote

import torch
from pydantic import Field
from torch import Tensor

from tailorpo.errors import RewardError
from tailorpo.rewards.http import NoAnswerError, ask
from tailorpo.rewards.wire import CONTENT_TYPE, PROTOCOL, Question, decode_answer
from tailorpo.settings import check_fields, did_you_mean

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class RemoteReward:
    """A reward of another recipe, computed by `tailorpo serve-reward`, here or on another machine.

    Attributes:
        url: of the server: "http://127.0.0.1:8765".
        serves: which of the server's rewards; null where it has one.
        differentiable: whether to ask for gradients, too; the server's reward has to have them.
        timeout: seconds per request.
        retries: further attempts after 429, 5xx, a timeout or a lost connection.
    """

    name: Literal["remote"] = "remote"
    # Where and how patiently it is asked is no part of what is trained: a run may be resumed with another server.
    url: str = field(compare=False)
    serves: str | None = None
    differentiable: bool = False
    timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = field(default=120.0, compare=False)
    retries: Annotated[int, Field(ge=0)] = field(default=4, compare=False)
    needs = "url: of a running `tailorpo serve-reward RECIPE`"
    units = "those of the reward that is served"
    source = "docs/rewards/remote.md"

    def __post_init__(self) -> None:
        """Raise ValueError, naming the key, for what cannot work."""
        check_fields(self)
        if not re.fullmatch(r"https?://[^/\s]+/?", self.url):
            raise ValueError(f"url: a server's address such as http://127.0.0.1:8765, not {self.url!r}")

    def load(self, device: torch.device | str) -> RemoteScorer:
        """Ask the server what it has; RewardError if it does not answer, or has nothing that fits."""
        found = self.ask("/", None, _read_rewards)
        if self.serves is None and len(found) > 1:
            raise RewardError(f"reward {self.name!r}: {self.url} serves {', '.join(found)}; say which one as `serves`")
        served = next(iter(found)) if self.serves is None else self.serves
        if served not in found:
            raise RewardError(
                f"reward {self.name!r}: {self.url} serves no {served!r}, but {', '.join(found)}"
                f"{did_you_mean(served, list(found))}"
            )
        if self.differentiable and not found[served]:
            raise RewardError(
                f"reward {self.name!r}: {served}, which {self.url} serves, has no gradient; leave `differentiable` out"
            )
        return RemoteScorer(self, served)

    def ask(self, path: str, body: bytes | None, read: Callable[[bytes], _T]) -> _T:
        """What `read` makes of the answer to a GET, or to a POST of a body.

        Raises:
            RewardError: there is none, or none that can be read.
        """
        address = f"{self.url.rstrip('/')}{path}"
        request = urllib.request.Request(address, data=body, headers={"Content-Type": CONTENT_TYPE})
        try:
            return ask(request, read, timeout=self.timeout, retries=self.retries)
        except NoAnswerError as error:
            raise RewardError(
                f"reward {self.name!r}: no score from {address} after {error.attempts}; it said\n  {error.said}\n"
                f"  is `tailorpo serve-reward RECIPE` running there? (url; timeout is {self.timeout:g} s)"
            ) from error


class RemoteScorer:
    """The reward of a server that has answered."""

    def __init__(self, config: RemoteReward, served: str, *, time: int | None = None) -> None:
        """Take the section, the name under which the server knows the reward, and the time it is told."""
        self.name = config.name
        self.differentiable = config.differentiable
        self.config = config
        self.served = served
        self._time = time

    def at(self, time: int) -> RemoteScorer:
        """The same, told that the pictures are predictions at the network's time; the server's reward may not care."""
        return RemoteScorer(self.config, self.served, time=time)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B, 3, H, W) in [0, 1] and B prompts -> (B,) float32, with the graph to the pictures if gradients are on.

        Raises:
            RewardError: the server cannot be reached, refuses, or answers something else.
        """
        gradient = torch.is_grad_enabled() and images.requires_grad
        question = Question(images=images.detach(), prompts=tuple(prompts), time=self._time, gradient=gradient)
        scores, slope = self.config.ask(
            f"/score/{quote(self.served, safe='')}", question.encode(), lambda answer: decode_answer(answer, question)
        )
        scores = scores.to(images.device)
        if slope is None:
            return scores
        # Adds zero, whose gradient is the one that the server sent.
        return scores + ((images - images.detach()) * slope.to(images.device)).flatten(1).sum(1)


def _read_rewards(answer: bytes) -> dict[str, bool]:
    """The served rewards and whether they have gradients."""
    try:
        facts = json.loads(answer)
        version, rewards = facts["protocol"], {str(name): bool(has) for name, has in facts["rewards"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"something that no `tailorpo serve-reward` says: {answer[:200]!r}") from error
    if version != PROTOCOL or not rewards:
        raise ValueError(
            f"protocol {version!r}, and this is {PROTOCOL}: take the same version of tailorpo on both sides"
        )
    return rewards
