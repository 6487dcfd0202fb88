"""The parts of `tailorpo jensen` that are not the mixture's: cost, lookahead, verdict."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tailorpo.experiments.measurement import Lines
from tailorpo.jensen.measure import Subject, measure
from tailorpo.jensen.settings import Sizes, chosen_steps, cost
from tailorpo.jensen.siblings import sibling_values, walk
from tailorpo.jensen.verdict import judge
from tailorpo.noise import Noise
from tailorpo.policy import Policy
from tailorpo.progress import Silent


@pytest.mark.parametrize("steps", [(0, 3, 5), (1, 4)])
def test_the_cost_is_what_is_spent(tiny_policy: Callable[..., Policy], tmp_path: Path, steps: tuple[int, ...]) -> None:
    """Latents that go through the UNet, pictures that are scored, gradients of the reward; counted, not derived."""
    policy = tiny_policy(steps=6)
    pictures, gradients = 0, 0

    def counted(images: Tensor, prompts: Any) -> Tensor:
        nonlocal pictures, gradients
        gradients += len(images) * images.requires_grad
        pictures += len(images) * (not images.requires_grad)
        return (images * images).mean((1, 2, 3))

    subject = Subject(policy=policy, prompts=["a cat", "a dog"], rewards={"r": counted}, differentiable=["r"], seed=0)
    sizes = Sizes(states=4, continuations=3, lookahead=2, plain_states=4, probes=2, batch=7)
    unet: Any = policy.model
    rows = 0

    def seen(module: Any, arguments: Any) -> None:
        nonlocal rows
        rows += len(arguments[0])

    with unet.unet.register_forward_pre_hook(seen):
        measure(subject, sizes, steps, lines=Lines(tmp_path / "rows.jsonl", {}), reporter=Silent())
    found = cost(sizes, steps, sampler=policy.sampler, differentiable=1)
    assert rows == 2 * found.forwards + found.plain_forwards
    assert pictures == found.pictures
    assert gradients == found.reward_gradients


def test_continuations_are_plain_sampling_and_siblings_share_their_noise(tiny_policy: Callable[..., Policy]) -> None:
    """A sibling continued by hand, and one pair of equal siblings, whose continuations are equal."""
    policy = tiny_policy(steps=4, moved=0.3)
    noise, key = Noise(0), ("s", 7)
    walked = walk(policy, ["a cat"], noise=noise, keys=[key])

    def mean(images: Tensor, prompts: Any) -> Tensor:
        return images.mean((1, 2, 3))

    found = sibling_values(policy, walked, k=1, rewards={"mean": mean}, noise=noise, continuations=3, ahead=1, batch=2)[
        "mean"
    ]
    shape = walked.latents[1].shape[1:]
    with torch.no_grad():
        for j in (0, 1):
            x = walked.steps[1].gaussian.sample(noise.normal(shape, *key, "step", 1, "candidate", j)[None])
            guess = policy.model.decode(policy.step(x, 2, walked.cond).x0).mean()
            assert float(found.guess[0, j]) == pytest.approx(float(guess), abs=1e-5)
            for n in range(3):
                y = x
                for k in (2, 3):
                    z = noise.normal(shape, *key, "future", 1, n, "step", k)[None]
                    y = policy.step(y, k, walked.cond).gaussian.sample(z)
                assert float(found.ends[0, j, n]) == pytest.approx(float(policy.model.decode(y).mean()), abs=1e-5)


def test_steps() -> None:
    assert chosen_steps(None, steps=20) == (0, 3, 5, 8, 11, 14, 16, 19)
    assert chosen_steps(None, steps=3) == (0, 1, 2)
    assert chosen_steps(None, steps=1) == (0,)
    assert chosen_steps("all", steps=4) == (0, 1, 2, 3)
    assert chosen_steps("5, 1,5", steps=6) == (1, 5)


def row(k: int, low: float, value: float, high: float, **more: Any) -> dict[str, Any]:
    ranks = {"k": k, "misrank_low": low, "misrank": value, "misrank_high": high, "reliability": 0.9, "v": 1.0}
    return ranks | {"gap_rms": 2.0, "signal": 0.5, "gap_difference": 0.1} | more


def verdict(*rows: dict[str, Any]) -> dict[str, Any]:
    reward = {
        "steps": rows,
        "variance": 10.0,
        "decided_by_denoising": 5.0,
        "interpolated": False,
        "lookahead_gain": None,
    }
    return judge(reward, last=9)


def test_reliable_is_from_where_on_nothing_is_worse() -> None:
    found = verdict(
        row(0, 0.3, 0.4, 0.5), row(2, 0.0, 0.1, 0.2), row(4, 0.1, 0.2, 0.3), row(6, 0, 0.1, 0.24), row(9, 0, 0, 0)
    )
    assert found["reliable_from"] == 6
    assert (found["reliable"], found["unreliable"], found["undecided"]) == ([2, 6, 9], [0], [4])
    assert found["headline"] == "Rankings by the step reward are reliable from step 6 on"
    text = " ".join(found["sentences"])
    assert "Worse than 25 % with 95 % confidence: step 0." in text
    assert "reaches across 25 %: step 4" in text
    assert "50 % is decided by the noise of the steps" in text
    assert "hold 60 % of what the measured steps decide" in text
    assert "4.0 times what siblings differ by (0.5)" in text


@pytest.mark.parametrize(
    ("rows", "headline"),
    [
        (
            [row(1, 0, 0.1, 0.2), row(5, 0, 0.1, 0.2)],
            "Rankings by the step reward are reliable at every measured step (1 to 5)",
        ),
        (
            [row(1, 0, 0.1, 0.2), row(5, 0, 0.1, 0.25)],
            "Rankings by the step reward are not shown to be reliable at step 5, the last measured",
        ),
        (
            [row(1, 0.3, 0.4, 0.5), row(9, 0, 0, 0)],
            "Rankings by the step reward are reliable only at the last step, among finished pictures",
        ),
    ],
)
def test_headlines(rows: list[dict[str, Any]], headline: str) -> None:
    assert verdict(*rows)["headline"] == headline
