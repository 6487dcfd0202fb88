"""The reward `remote` against a real server in a thread: the bits of the reward itself, and every failure in words."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import settings
from torch import Tensor

from tailorpo.errors import RewardError, UserError
from tailorpo.reward_server import LONGEST, make_server
from tailorpo.rewards import (
    Brightness,
    Colourfulness,
    CustomReward,
    EmojiPreference,
    EmojiStepPreference,
    JpegCompressibility,
    RemoteReward,
    RewardConfig,
    RewardEntry,
    Scorer,
    load_scorer,
)
from tailorpo.rewards.wire import CONTENT_TYPE, Question
from tailorpo.run import Run

PROMPTS = ("a cat", "a dog on a blue background", "a caf\u00e9")


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@contextmanager
def running(server: ThreadingHTTPServer) -> Iterator[str]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def serving(*rewards: RewardConfig) -> Any:
    return running(make_server([RewardEntry(reward=each) for each in rewards], host="127.0.0.1", port=0))


@contextmanager
def saying(status: int, answer: bytes, *, first: bytes = b'{"protocol": 1, "rewards": {"x": true}}') -> Iterator[Any]:
    """A server that says `first` when it is asked what it has, and `answer` to every question; counts them."""

    class Handler(BaseHTTPRequestHandler):
        asked = 0

        def do_GET(self) -> None:
            self.reply(200, first)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            Handler.asked += 1
            self.reply(status, answer)

        def reply(self, status: int, answer: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    with running(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as url:
        yield url, Handler


def remote(url: str, **settings: Any) -> Scorer:
    config = RemoteReward(url=url, **{"retries": 0, "timeout": 5.0, **settings})
    return load_scorer([RewardEntry(reward=config)], "cpu")


def pictures(seed: int = 0) -> Tensor:
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def gradient(score: Any) -> Tensor:
    images = pictures().requires_grad_()
    (found,) = torch.autograd.grad((score(images, PROMPTS) * torch.tensor([1.0, -2.0, 0.5])).sum(), images)
    return found


def test_scores_and_gradients_have_the_bits_of_the_reward_itself() -> None:
    local = load_scorer([RewardEntry(reward=EmojiPreference())], "cpu")
    with serving(EmojiPreference()) as url:
        far = remote(url, differentiable=True)
        assert torch.equal(far(pictures(), PROMPTS), local(pictures(), PROMPTS))
        # Powers of two: what the caller multiplies by is the only thing that comes after the network.
        assert torch.equal(gradient(far), gradient(local))
        assert far(pictures(), PROMPTS).unique().numel() == 3


def test_a_reward_that_is_told_the_time_is_told_it_there_too() -> None:
    local = load_scorer([RewardEntry(reward=EmojiStepPreference())], "cpu")
    with serving(EmojiStepPreference()) as url:
        far = remote(url)
        for time in (1, 600):
            assert torch.equal(far.at(time)(pictures(), PROMPTS), local.at(time)(pictures(), PROMPTS))
        assert not torch.equal(far.at(600)(pictures(), PROMPTS), far(pictures(), PROMPTS))


def test_one_of_several_rewards_by_its_name() -> None:
    bright = CustomReward.of(lambda images, prompts: images.mean(dim=(1, 2, 3)))
    with serving(Brightness(), Colourfulness(), bright) as url:
        with pytest.raises(RewardError, match=r"serves brightness, colourfulness, .*say which one as `serves`"):
            remote(url)
        with pytest.raises(RewardError, match=r"serves no 'brighness', but .*did you mean `brightness`\?"):
            remote(url, serves="brighness")
        assert torch.equal(
            remote(url, serves="colourfulness")(pictures(), PROMPTS),
            load_scorer([RewardEntry(reward=Colourfulness())], "cpu")(pictures(), PROMPTS),
        )
        # A name with what means something in an address.
        assert remote(url, serves=bright.name)(pictures(), PROMPTS).shape == (3,)


def test_a_reward_without_a_gradient() -> None:
    with serving(JpegCompressibility()) as url:
        with pytest.raises(RewardError, match=r"jpeg_compressibility, which .* has no gradient; leave"):
            remote(url, differentiable=True)
        far = remote(url)
        assert torch.equal(far(pictures(), PROMPTS), JpegCompressibility().load("cpu")(pictures(), PROMPTS))
        with pytest.raises(RewardError, match="has no gradient, and one was asked for"):
            far(pictures().requires_grad_(), PROMPTS)


def test_a_score_that_is_no_number_is_judged_by_the_run_that_asked() -> None:
    def odd(images: Tensor, prompts: Any) -> list[float]:
        return [1.0, float("nan"), float("inf")]

    with serving(CustomReward.of(odd)) as url:
        with pytest.raises(RewardError, match=r"'remote' returned nan for 2 of 3 pictures"):
            remote(url)(pictures(), PROMPTS)
        config = RewardEntry(reward=RemoteReward(url=url))
        scores = load_scorer([config], "cpu", on_invalid="skip")(pictures(), PROMPTS)
        assert scores.isnan().tolist() == [False, True, True]


def test_what_the_reward_raises_comes_back_at_the_first_attempt() -> None:
    asked: list[int] = []

    def broken(images: Tensor, prompts: Any) -> Tensor:
        asked.append(1)
        raise KeyError("no such prompt")

    words = r"after 1 attempt; it said\n  422 .*KeyError: 'no such prompt'"
    with serving(CustomReward.of(broken)) as url, pytest.raises(RewardError, match=words):
        remote(url, retries=3)(pictures(), PROMPTS)
    assert len(asked) == 1


def test_a_server_that_is_not_there() -> None:
    with serving(Brightness()) as url:
        far = remote(url)
    for ask in (lambda: remote(url), lambda: far(pictures(), PROMPTS)):
        with pytest.raises(RewardError) as caught:
            ask()
        for word in (url, "ConnectionRefusedError", "`tailorpo serve-reward RECIPE` running there?"):
            assert word in str(caught.value)


def test_a_server_that_is_too_slow() -> None:
    release = threading.Event()

    def slow(images: Tensor, prompts: Any) -> Tensor:
        release.wait(10)
        return images.mean(dim=(1, 2, 3))

    with serving(CustomReward.of(slow)) as url:
        try:
            with pytest.raises(RewardError, match=r"after 1 attempt; it said\n  TimeoutError.*\n.*timeout is 0.2 s"):
                remote(url, timeout=0.2)(pictures(), PROMPTS)
        finally:
            release.set()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"hello", "not safetensors"),
        (b"", "not safetensors"),
        ("rows", r"something else than `scores` of shape \(3,\), float32: \(1,\)"),
        ("names", "nothing of that name"),
    ],
)
def test_an_answer_that_does_not_fit(answer: bytes | str, words: str) -> None:
    from safetensors.torch import save

    sent = {"rows": save({"scores": torch.zeros(1)}), "names": save({"other": torch.zeros(3)})}
    with saying(200, sent[answer] if isinstance(answer, str) else answer) as (url, handler):
        with pytest.raises(RewardError, match=words):
            remote(url, retries=3)(pictures(), PROMPTS)
        assert handler.asked == 1


def test_a_failing_server_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tailorpo.rewards.http._LONGEST_PAUSE", 0.01)
    with saying(503, b"loading") as (url, handler):
        with pytest.raises(RewardError, match=r"after 3 attempts; it said\n  503 .*: loading"):
            remote(url, retries=2)(pictures(), PROMPTS)
        assert handler.asked == 3


@pytest.mark.parametrize(
    ("first", "words"),
    [
        (b"<html>", "something that no `tailorpo serve-reward` says"),
        (b'{"protocol": 1}', "something that no `tailorpo serve-reward` says"),
        (b'{"protocol": 2, "rewards": {"x": true}}', "protocol 2, and this is 1"),
    ],
)
def test_a_server_of_something_else(first: bytes, words: str) -> None:
    with saying(200, b"", first=first) as (url, _), pytest.raises(RewardError, match=words):
        remote(url)


@pytest.mark.parametrize(
    ("path", "kind", "body", "status"),
    [
        ("/score/nothing", CONTENT_TYPE, b"", 404),
        ("/elsewhere", CONTENT_TYPE, b"", 404),
        ("/score/brightness", "text/plain", b"", 415),  # what a page in a browser could send
        ("/score/brightness", CONTENT_TYPE, b"nonsense", 422),
        ("/score/brightness", CONTENT_TYPE, None, 404),
    ],
)
def test_requests_of_others_are_refused(path: str, kind: str, body: bytes | None, status: int) -> None:
    with serving(Brightness()) as url:
        request = urllib.request.Request(url + path, data=body, headers={"Content-Type": kind})
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=5)
        assert caught.value.code == status
        caught.value.close()
        assert remote(url)(pictures(), PROMPTS).shape == (3,)  # and it goes on


def test_a_request_that_is_too_long_is_not_read() -> None:
    with serving(Brightness()) as url:
        request = urllib.request.Request(
            f"{url}/score/brightness", data=b"x", headers={"Content-Type": CONTENT_TYPE, "Content-Length": LONGEST + 1}
        )
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=5)
        assert caught.value.code == 413
        caught.value.close()


def test_questions_that_make_no_sense_are_refused() -> None:
    good = Question(images=pictures(), prompts=PROMPTS, time=7, gradient=True)
    read = Question.decode(good.encode())
    assert torch.equal(read.images, good.images)
    assert (read.prompts, read.time, read.gradient) == (PROMPTS, 7, True)
    wrong: dict[str, Any] = {
        "3 pictures came with 2 prompts": {"prompts": PROMPTS[:2]},
        "list of prompts": {"prompts": (1, 2, 3)},
        "shape": {"images": torch.zeros(3, 1, 8, 8)},
        "time": {"time": "7"},
        "gradient": {"gradient": 1},
    }
    for words, change in wrong.items():
        with pytest.raises(ValueError, match=words):
            Question.decode(Question(**{**vars(good), **change}).encode())


def test_the_section_is_checked_and_may_move(tiny_folder: Path) -> None:
    for changes, words in (
        ({"url": "localhost:8765"}, "a server's address such as"),
        ({"url": "http://localhost:8765/v1"}, "a server's address such as"),
        ({"timeout": 0}, "timeout"),
        ({"retries": -1}, "retries"),
    ):
        with pytest.raises(UserError, match=words):
            Run.from_dict(settings(tiny_folder, reward={"name": "remote", "url": "http://a", **changes}))
    run = Run.from_dict(settings(tiny_folder, reward={"name": "remote", "url": "http://a:1", "differentiable": True}))
    assert Run.from_dict(run.to_dict()) == run
    assert run.resumed(["reward.url=http://b:2"]).reward[0].reward.url == "http://b:2"  # pyright: ignore
    with pytest.raises(UserError, match="cannot change"):
        run.resumed(["reward.serves=another"])


def test_a_port_that_is_taken() -> None:
    with serving(Brightness()) as url, pytest.raises(UserError, match=r"cannot listen on 127\.0\.0\.1:"):
        make_server([RewardEntry(reward=Brightness())], host="127.0.0.1", port=int(url.rpartition(":")[2]))
