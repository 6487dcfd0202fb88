"""A vision-language model on a server as judge: any that speaks OpenAI's chat completions (vLLM, llama.cpp, ...).

Each picture is sent with one question, `question` with the prompt in place of {prompt}. How an answer becomes a number:

    number    the answer's only number, or the last that `pattern` finds: (number - low) / (high - low)
    yes_no    P(yes) / (P(yes) + P(no)) from the log-probabilities of the answer's first token, all spellings summed
    rubric    one number for each of `criteria`, in lines or as JSON: the mean of their (number - low) / (high - low)

So every score lies in 0 to 1. `yes_no` is VQAScore's idea (Lin et al. 2024, arXiv 2404.01291); `number` and `rubric`
are how UnifiedReward and its kin are asked. An answer without a number in low..high, or with several and no pattern,
becomes NaN: the run stops, unless it says `on_invalid_reward: skip`. A server that does not answer is an error, after
`retries`.

Pictures and prompts go to `url` and nowhere else; a redirection is refused. The key, if the server wants one, is read
from the environment variable that `key_variable` names, so that it stands in no file. Not differentiable. Left out:
comparing two pictures in one question, and several samples per question.
"""

from __future__ import annotations

import base64
import json
import math
import os
import re
import threading
import urllib.request
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from tailorpo.errors import RewardError
from tailorpo.images import png_bytes, to_pil
from tailorpo.rewards.http import NoAnswerError, ask
from tailorpo.settings import check_fields

QUESTIONS = {
    "number": 'This picture was made for the prompt "{prompt}". How good is it, in quality and in showing what the '
    "prompt says? Answer with one number from {low} to {high} and nothing else.",
    "yes_no": 'Does this picture show "{prompt}"? Answer yes or no.',
    "rubric": 'This picture was made for the prompt "{prompt}". Rate it from {low} to {high} in each of these: '
    "{criteria}. Answer with one line for each, the name, a colon and a number.",
}
"""What is asked where the run file has no question of its own."""

_NUMBER = r"-?\d+(?:\.\d+)?"

Positive = Annotated[int, Field(ge=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True)
class VisionJudge:
    """A vision-language model behind an OpenAI-compatible server, asked about each picture.

    Attributes:
        url: of the server, up to and with the version: "http://localhost:8000/v1".
        model: the name under which the server knows it.
        answer: "number", "yes_no" or "rubric".
        question: with {prompt}, and if wanted {low}, {high} and {criteria}; null for the one in `QUESTIONS`.
        pattern: for "number": a regular expression whose only group is the number; null for the answer's only number.
        low: the worst number of "number" and "rubric".
        high: the best one.
        criteria: the names that "rubric" asks for.
        key_variable: the environment variable with the server's key; null for none.
        side: the longer side in pixels to which larger pictures are reduced; null to send them as they are.
        max_tokens: of the answer.
        timeout: seconds per request.
        retries: further attempts after 429, 5xx, a timeout or a lost connection.
        parallel: requests at once.
    """

    name: Literal["vision_judge"] = "vision_judge"
    url: str
    model: str
    answer: Literal["number", "yes_no", "rubric"] = "number"
    question: str | None = None
    pattern: str | None = None
    low: Finite = 1.0
    high: Finite = 10.0
    criteria: tuple[str, ...] = ("prompt", "composition", "detail")
    key_variable: str | None = None
    side: Positive | None = None
    max_tokens: Positive = 64
    timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60.0
    retries: Annotated[int, Field(ge=0)] = 4
    parallel: Positive = 8
    differentiable = False
    needs = "url and model: an OpenAI-compatible server with a vision-language model"
    units = "share of the way from worst to best, or probability of yes: 0 to 1"
    source = "docs/rewards/vision_judge.md"

    def __post_init__(self) -> None:
        """Raise ValueError, naming the key, for what cannot work."""
        check_fields(self)
        if not re.match(r"https?://[^/\s]+", self.url):
            raise ValueError(f"url: a server's address such as http://localhost:8000/v1, not {self.url!r}")
        if self.low >= self.high:
            raise ValueError(f"low, high: low has to be below high, not {self.low:g} and {self.high:g}")
        if self.question is not None and "{prompt}" not in self.question:
            raise ValueError("question: it has to hold {prompt}")
        if self.pattern is not None and _groups(self.pattern) != 1:
            raise ValueError(f"pattern: a regular expression with one group, the number, not {self.pattern!r}")
        if not self.criteria or len({each.lower() for each in self.criteria}) != len(self.criteria):
            raise ValueError("criteria: at least one, all different")

    def load(self, device: torch.device | str) -> VisionJudgeScorer:
        """Look the key up; RewardError if its variable is not set. The server is first asked with the first picture."""
        key = None if self.key_variable is None else os.environ.get(self.key_variable)
        if self.key_variable is not None and not key:
            raise RewardError(
                f"reward {self.name!r}: the environment variable {self.key_variable} (key_variable) is empty"
            )
        return VisionJudgeScorer(self, key)


class VisionJudgeScorer:
    """The judge, ready to be asked."""

    differentiable = False

    def __init__(self, config: VisionJudge, key: str | None) -> None:
        """Take the configuration, and the server's key if it wants one."""
        self.name = config.name
        self.config = config
        self._address = f"{config.url.rstrip('/')}/chat/completions"
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B, 3, H, W) in [0, 1] and B prompts -> (B,) float32, NaN where an answer is no score.

        Raises:
            RewardError: the server cannot be reached, refuses, or does not send what the mode of answer needs.
        """
        stop = threading.Event()
        with ThreadPoolExecutor(self.config.parallel) as pool:
            asked = [pool.submit(self._score, *pair, stop) for pair in zip(images.detach().cpu(), prompts, strict=True)]
            try:
                for each in wait(asked, return_when=FIRST_EXCEPTION).done:
                    each.result()  # raises what was raised, without waiting for the others
                scores = [each.result() for each in asked]
            finally:  # after the first failure, the others make no further attempt
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def answer(self, image: Tensor, prompt: str) -> str:
        """What the judge says about one picture (3, H, W), in its own words: to try a question out."""
        return self._text(self._post(self._request(image, prompt), threading.Event()))

    def _score(self, image: Tensor, prompt: str, stop: threading.Event) -> float:
        config, reply = self.config, self._post(self._request(image, prompt), stop)
        if config.answer == "yes_no":
            return self._yes_share(reply)
        text = self._text(reply)
        if config.answer == "rubric":
            return rubric_mean(text, config.criteria, low=config.low, high=config.high)
        return number_share(text, pattern=config.pattern, low=config.low, high=config.high)

    def _request(self, image: Tensor, prompt: str) -> bytes:
        config = self.config
        question = config.question or QUESTIONS[config.answer]
        words = {"low": f"{config.low:g}", "high": f"{config.high:g}", "criteria": ", ".join(config.criteria)}
        for word, value in (words | {"prompt": prompt}).items():  # the prompt last: braces in it stay as they are
            question = question.replace(f"{{{word}}}", value)
        picture = {"type": "image_url", "image_url": {"url": _data_url(image, config.side)}}
        body: dict[str, Any] = {
            "model": config.model,
            "temperature": 0,
            "max_tokens": config.max_tokens,
            "messages": [{"role": "user", "content": [picture, {"type": "text", "text": question}]}],
        }
        if config.answer == "yes_no":
            body |= {"max_tokens": 1, "logprobs": True, "top_logprobs": 20}
        return json.dumps(body).encode()

    def _post(self, body: bytes, stop: threading.Event) -> Any:
        """The server's JSON, after as many attempts as it takes."""
        request = urllib.request.Request(self._address, data=body, headers=self._headers, method="POST")
        try:
            return ask(request, _json, timeout=self.config.timeout, retries=self.config.retries, stop=stop)
        except NoAnswerError as error:
            raise RewardError(
                f"reward {self.name!r}: no answer from {self._address} after {error.attempts}; it said\n  {error.said}"
            ) from error

    def _text(self, reply: Any) -> str:
        """The text of an answer; empty where a server says null, as for a refusal."""
        try:
            text: object = reply["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise self._no("answer", reply) from error
        return text if isinstance(text, str) else ""

    def _yes_share(self, reply: Any) -> float:
        try:
            first = reply["choices"][0]["logprobs"]["content"][0]
            likeliest = [(each["token"], each["logprob"]) for each in first["top_logprobs"]]
            if not likeliest:
                raise KeyError("top_logprobs")
        except (KeyError, IndexError, TypeError) as error:
            raise self._no("log-probabilities, which answer: yes_no needs,", reply) from error
        return yes_share(likeliest)

    def _no(self, what: str, reply: Any) -> RewardError:
        return RewardError(f"reward {self.name!r}: no {what} in what {self._address} sent\n  {json.dumps(reply)[:500]}")


def number_share(text: str, *, pattern: str | None, low: float, high: float) -> float:
    """(number - low) / (high - low) of the number in an answer, or NaN: none, several, or one outside of low..high."""
    if pattern is not None:
        found = [match[1] or "" for match in re.finditer(pattern, text)][-1:]
    else:  # of "8/10" and "8 out of 10" the 8
        found = re.findall(rf"({_NUMBER})(?:\s*(?:/|out of)\s*\d+)?", text)
    try:
        numbers = set(map(float, found))
    except ValueError:
        return math.nan
    return _share(numbers.pop(), low, high) if len(numbers) == 1 else math.nan


def rubric_mean(text: str, criteria: Sequence[str], *, low: float, high: float) -> float:
    """The mean share of all criteria, of which every one has to be there; NaN otherwise."""
    shares: list[float] = []
    for each in criteria:
        # "detail": 7, or **Detail:** 7/10, or - detail - 7
        found = re.search(rf"(?<!\w){re.escape(each)}(?!\w)[\s\"'*_`:=-]*?({_NUMBER})", text, re.IGNORECASE)
        shares.append(math.nan if found is None else _share(float(found[1]), low, high))
    return math.fsum(shares) / len(shares)


def yes_share(top: Sequence[tuple[str, float]]) -> float:
    """P(yes) / (P(yes) + P(no)) over a token's likeliest (text, log-probability), any spelling; NaN without either."""
    sums = {"yes": 0.0, "no": 0.0}
    for token, logprob in top:
        word = token.strip(" \t\n.,:;!\"'*_\u0120\u2581").lower()
        if word in sums:
            sums[word] += math.exp(logprob)
    total = sums["yes"] + sums["no"]
    return sums["yes"] / total if total > 0 else math.nan


def _share(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low) if low <= value <= high else math.nan


def _data_url(image: Tensor, side: int | None) -> str:
    """A data URL of a picture as PNG, its longer side no more than `side` pixels."""
    picture = to_pil(image)
    if side is not None and max(picture.size) > side:
        picture.thumbnail((side, side), Image.Resampling.BICUBIC)
    return "data:image/png;base64," + base64.b64encode(png_bytes(picture)).decode()


def _json(answer: bytes) -> Any:
    try:
        return json.loads(answer)
    except ValueError as error:
        raise ValueError(f"something that is not JSON: {error}") from error


def _groups(pattern: str) -> int:
    try:
        return re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"pattern: {pattern!r} is no regular expression: {error}") from error
