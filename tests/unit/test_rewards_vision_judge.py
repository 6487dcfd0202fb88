"""The judge on a server, against a real HTTP server in a thread."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from judge_server import Answer, JudgeServer, judge_server, received, says

from tailorpo.errors import RewardError, RunFileError
from tailorpo.rewards import Scorer, VisionJudge
from tailorpo.rewards.vision_judge import number_share, rubric_mean, yes_share
from tailorpo.run import Run


def likely(*top: tuple[str, float]) -> dict[str, Any]:
    alternatives = [{"token": token, "logprob": math.log(p)} for token, p in top]
    return says(top[0][0] if top else "", logprobs={"content": [{"token": "x", "top_logprobs": alternatives}]})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeServer]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with judge_server() as running:
        yield running


IMAGES = torch.arange(6).div(10).view(6, 1, 1, 1).expand(6, 3, 8, 12).contiguous()
PROMPTS = [f"picture {{low}} {number}" for number in range(6)]


def test_a_number_and_what_is_sent_for_it(server: JudgeServer) -> None:
    server.reply = lambda body, number: "Score: 7/10"
    reward = server.judge().load("cpu")
    scores = Scorer([(reward, 1.0)])(IMAGES[3:4], PROMPTS[3:4])
    assert scores.tolist() == pytest.approx([6 / 9])
    (body,) = server.asked
    assert server.paths == ["/v1/chat/completions"]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("tiny-vl", 0, 64)
    assert "logprobs" not in body
    picture, question = received(body)
    assert torch.allclose(picture, IMAGES[3], atol=1 / 510 + 1e-6)
    assert '"picture {low} 3"' in question
    assert "from 1 to 10" in question
    assert "Authorization" not in server.headers[0]
    assert reward.answer(IMAGES[0], "a cat") == "Score: 7/10"


def test_own_question_pattern_range_size_and_key(server: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.reply = lambda body, number: "Of 2 cats one is blurred.\nFinal Score: 4.5\n"
    settings = {
        "question": "{prompt}? {low:g} {high}",
        "pattern": r"Final Score:\s*(\d(?:\.\d+)?)",
        "low": 1.0,
        "high": 5.0,
    }
    config = server.judge(**settings, side=6, key_variable="JUDGE_KEY")
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(RewardError, match=r"environment variable JUDGE_KEY \(key_variable\) is empty"):
        config.load("cpu")
    monkeypatch.setenv("JUDGE_KEY", "secret-7")
    assert config.load("cpu")(IMAGES[:1], ["a {prompt}"]).tolist() == pytest.approx([3.5 / 4])
    picture, question = received(server.asked[0])
    assert picture.shape == (3, 4, 6)
    assert question == "a {prompt}? {low:g} 5"
    assert server.headers[0]["Authorization"] == "Bearer secret-7"
    assert "secret-7" not in repr(config)


def test_yes_or_no_sums_all_spellings(server: JudgeServer) -> None:
    server.reply = lambda body, number: likely(("Yes", 0.4), (" yes", 0.1), ("No", 0.2), ("NO.", 0.05), ("Maybe", 0.2))
    scores = server.judge(answer="yes_no").load("cpu")(IMAGES[:1], ["a cat"])
    assert scores.tolist() == pytest.approx([0.5 / 0.75])
    assert (server.asked[0]["max_tokens"], server.asked[0]["logprobs"], server.asked[0]["top_logprobs"]) == (
        1,
        True,
        20,
    )
    assert received(server.asked[0])[1] == 'Does this picture show "a cat"? Answer yes or no.'
    server.reply = lambda body, number: likely(("Perhaps", 1.0))
    assert server.judge(answer="yes_no").load("cpu")(IMAGES[:1], ["a cat"]).isnan().all()


@pytest.mark.parametrize(
    "answer",
    [
        "prompt: 10\ncomposition: 5.5\ndetail: 1",
        '{"prompt": 10, "composition": 5.5, "detail": 1}',
        "- **Prompt**: 10/10\n- **Composition:** 5.5\n- **Detail** - 1",
    ],
)
def test_a_rubric_in_lines_or_json(server: JudgeServer, answer: str) -> None:
    server.reply = lambda body, number: answer
    scores = server.judge(answer="rubric").load("cpu")(IMAGES[:1], ["a cat"])
    assert scores.tolist() == pytest.approx([0.5])
    assert "prompt, composition, detail" in received(server.asked[0])[1]


def test_parallel_answers_keep_their_place(server: JudgeServer) -> None:
    def reply(body: dict[str, Any], number: int) -> str:
        picture, question = received(body)
        index = int(question.split('"')[1].split()[-1])
        assert float(picture.mean()) == pytest.approx(index / 10, abs=1 / 255)
        time.sleep(0.02 * (6 - index))  # the first is answered last
        return str(index + 1)

    server.reply = reply
    scores = server.judge(parallel=6).load("cpu")(IMAGES, PROMPTS)
    assert scores.tolist() == pytest.approx([index / 9 for index in range(6)])


def test_it_tries_again_after_429_and_5xx(server: JudgeServer) -> None:
    def reply(body: dict[str, Any], number: int) -> Answer:
        return (429, b"slow down", {"Retry-After": "0.01"}) if number < 3 else "10"

    server.reply = reply
    assert server.judge(retries=2).load("cpu")(IMAGES[:1], ["a"]).tolist() == [1.0]
    assert len(server.asked) == 3
    server.asked.clear()
    server.reply = lambda body, number: (503, b"loading the model", {"Retry-After": "0.01"})
    with pytest.raises(
        RewardError, match=r"no answer from http.*completions after 2 attempts; it said\n  503 .*loading"
    ):
        server.judge(retries=1).load("cpu")(IMAGES[:1], ["a"])
    assert len(server.asked) == 2


def test_a_refusal_is_final_and_says_what_the_server_said(server: JudgeServer) -> None:
    server.reply = lambda body, number: (401, {"error": {"message": "wrong key"}}, {})
    with pytest.raises(RewardError, match=r"after 1 attempt; it said\n  401 Unauthorized: .*wrong key"):
        Scorer([(server.judge(retries=5).load("cpu"), 1.0)], on_invalid="skip")(IMAGES[:1], ["a"])
    assert len(server.asked) == 1


def test_a_redirection_is_not_followed(server: JudgeServer) -> None:
    server.reply = lambda body, number: (302, b"", {"Location": f"{server.url}/elsewhere"})
    with pytest.raises(RewardError, match=r"302 Found"):
        server.judge(retries=5).load("cpu")(IMAGES[:1], ["a"])
    assert server.paths == ["/v1/chat/completions"]


def test_a_server_that_is_silent_or_gone(server: JudgeServer) -> None:
    server.reply = lambda body, number: time.sleep(0.6) or "1"
    with pytest.raises(RewardError, match=r"after 2 attempts; it said\n  TimeoutError"):
        server.judge(timeout=0.1, retries=1).load("cpu")(IMAGES[:1], ["a"])
    gone = VisionJudge(url="http://127.0.0.1:1/v1", model="x", retries=0)
    with pytest.raises(RewardError, match=r"after 1 attempt; it said\n  ConnectionRefusedError"):
        gone.load("cpu")(IMAGES[:1], ["a"])


def test_one_refusal_ends_the_attempts_of_the_others(server: JudgeServer) -> None:
    def reply(body: dict[str, Any], number: int) -> Answer:
        last = received(body)[1].split('"')[1].endswith("5")
        return (400, b"bad prompt", {}) if last else (500, b"", {"Retry-After": "25"})

    server.reply = reply
    began = time.monotonic()
    with pytest.raises(RewardError, match=r"after 1 attempt; it said\n  400 Bad Request: bad prompt"):
        server.judge(parallel=6, retries=3).load("cpu")(IMAGES, PROMPTS)
    assert time.monotonic() - began < 20  # nobody waited for the 25 seconds
    assert len(server.asked) == 6


@pytest.mark.parametrize(
    ("settings", "reply", "message"),
    [
        ({}, b"<html>a gateway</html>", "something that is not JSON"),
        ({}, {"object": "error", "message": "no such model"}, r"no answer in what .*\n.*no such model"),
        ({}, {"choices": []}, "no answer in what"),
        ({"answer": "yes_no"}, says("Yes"), "no log-probabilities, which answer: yes_no needs, in what"),
        ({"answer": "yes_no"}, says("Yes", logprobs=None), "no log-probabilities"),
        ({"answer": "yes_no"}, likely(), "no log-probabilities"),
    ],
)
def test_replies_of_another_kind(server: JudgeServer, settings: dict[str, Any], reply: Any, message: str) -> None:
    server.reply = lambda body, number: (200, reply, {})
    with pytest.raises(RewardError, match=message):
        server.judge(**settings, retries=5).load("cpu")(IMAGES[:1], ["a"])
    assert len(server.asked) == 1


def test_an_answer_that_is_no_score_stops_the_run_or_is_skipped(server: JudgeServer) -> None:
    server.reply = lambda body, number: says(None) if "5" in received(body)[1].split('"')[1] else "I like it: 3"
    reward = server.judge().load("cpu")
    with pytest.raises(RewardError, match=r"returned nan for 1 of 6 pictures.*\n.*\n.*on_invalid_reward: skip"):
        Scorer([(reward, 1.0)])(IMAGES, PROMPTS)
    skipping = Scorer([(reward, 1.0)], on_invalid="skip")
    assert skipping(IMAGES, PROMPTS).isnan().tolist() == [False] * 5 + [True]
    assert skipping.invalid == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7", 6 / 9),
        ("8/10", 7 / 9),
        ("8 out of 10", 7 / 9),
        ("I give it a **4.5**.", 3.5 / 9),
        ("10", 1.0),
        ("1", 0.0),
        ("7, yes, 7", 6 / 9),
        ("", math.nan),
        ("good", math.nan),
        ("11", math.nan),
        ("0", math.nan),
        ("-7", math.nan),
        ("On a scale of 1 to 10 it is a 7", math.nan),
        ("7 or 8", math.nan),
    ],
)
def test_numbers_in_answers(text: str, expected: float) -> None:
    assert number_share(text, pattern=None, low=1, high=10) == pytest.approx(expected, nan_ok=True)


def test_patterns_take_the_last_and_rubrics_need_all() -> None:
    assert number_share("s=2 ... s=4", pattern=r"s=(\d)", low=0, high=4) == 1.0
    assert math.isnan(number_share("2", pattern=r"s=(\d)", low=0, high=4))
    assert math.isnan(number_share("s=", pattern=r"s=(\d)?", low=0, high=4))
    assert rubric_mean("b: 4, a: 1, aa: 3", ("a", "b"), low=0, high=4) == pytest.approx((1 + 4) / 8)
    assert math.isnan(rubric_mean("a: 1", ("a", "b"), low=0, high=4))
    assert math.isnan(rubric_mean("a: 1, b: 5", ("a", "b"), low=0, high=4))
    assert rubric_mean("C++ (code): 2", ("c++ (code)",), low=0, high=4) == 0.5
    assert yes_share([("yes", math.log(0.3)), ("\u0120No", math.log(0.1))]) == pytest.approx(0.75)
    assert math.isnan(yes_share([("yesterday", 0.0)]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "localhost:8000"}, r"url: a server's address such as"),
        ({"low": 5.0, "high": 5.0}, "low has to be below high"),
        ({"question": "Is it good?"}, r"question: it has to hold \{prompt\}"),
        ({"question": ""}, r"question: it has to hold \{prompt\}"),
        ({"pattern": "("}, "no regular expression"),
        ({"pattern": r"\d"}, "with one group"),
        ({"criteria": []}, "criteria: at least one"),
        ({"criteria": ["a", "A"]}, "criteria: at least one, all different"),
        ({"parallel": 0}, "parallel"),
        ({"timeout": 0.0}, "timeout"),
        ({"retries": -1}, "retries"),
        ({"answer": "stars"}, "answer"),
    ],
)
def test_a_run_file_with_a_mistake_says_which(settings: dict[str, Any], message: str) -> None:
    reward = {"name": "vision_judge", "url": "http://localhost:8000/v1", "model": "m", **settings}
    with pytest.raises(RunFileError, match=message):
        Run.from_dict(
            {"updates": 1, "model": {"path": "emoji"}, "prompts": {"list": ["a cat"]}, "reward": reward}, files=False
        )
