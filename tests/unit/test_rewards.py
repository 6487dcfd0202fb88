"""Rewards that need no weights, and the Scorer: formulas against independent oracles, faults, counting, gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from tailorpo.errors import DivergedError, RewardError
from tailorpo.rewards import (
    Brightness,
    Colourfulness,
    EmojiPreference,
    JpegCompressibility,
    JpegIncompressibility,
    RewardEntry,
    Scorer,
    describe_rewards,
    load_scorer,
)

PROMPTS = ("a cat", "a dog", "a snail", "a horse")


def pictures(count: int = 4, size: int = 24, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@dataclass
class Fake:
    """A reward made of one function."""

    function: Callable[[Tensor, Sequence[str]], object]
    differentiable: bool = False
    name: str = "fake"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.function(images, prompts)  # pyright: ignore[reportReturnType]


def red(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images[:, 0].mean((1, 2))


# -- JPEG ----------------------------------------------------------------------------------------------------------


def test_jpeg_size_is_that_of_a_file_on_disk(tmp_path: Path) -> None:
    images = pictures(3, 40)
    sizes = []
    for index, image in enumerate(images.numpy()):
        # Another way to the bytes: pixel by pixel through putpixel, and another way to the size: the file system.
        picture = Image.new("RGB", (40, 40))
        for y in range(40):
            for x in range(40):
                picture.putpixel((x, y), tuple(round(float(np.float32(255) * v)) for v in image[:, y, x]))
        picture.save(tmp_path / f"{index}.jpg", quality=95)
        sizes.append((tmp_path / f"{index}.jpg").stat().st_size / 1000)
    assert JpegIncompressibility()(images, PROMPTS[:3]).tolist() == pytest.approx(sizes, abs=1e-6)
    assert JpegCompressibility()(images, PROMPTS[:3]).tolist() == pytest.approx([-size for size in sizes], abs=1e-6)


def test_jpeg_orders_flat_below_smooth_below_noise_and_clamps() -> None:
    ramp = torch.linspace(0, 1, 64).expand(1, 3, 64, 64)
    flat, noise = torch.zeros(1, 3, 64, 64), pictures(1, 64)
    sizes = JpegIncompressibility()(torch.cat([flat, ramp, noise, flat - 3]), PROMPTS)
    assert sizes[0] < sizes[1] < sizes[2]
    assert sizes[3] == sizes[0]


# -- Colour --------------------------------------------------------------------------------------------------------


def test_colourfulness_is_the_papers_formula() -> None:
    images = pictures(4, 20, dtype=torch.float64)
    expected = []
    for red_plane, green, blue in images.numpy() * 255:
        rg, yb = red_plane - green, 0.5 * (red_plane + green) - blue
        expected.append(np.hypot(np.std(rg), np.std(yb)) + 0.3 * np.hypot(np.mean(rg), np.mean(yb)))
    assert Colourfulness()(images, PROMPTS).tolist() == pytest.approx(expected, rel=1e-6)


def test_colourfulness_of_plain_colours_by_hand() -> None:
    grey, pure_red = torch.full((3, 8, 8), 0.4), torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1).expand(3, 8, 8)
    scores = Colourfulness()(torch.stack([grey, pure_red]), PROMPTS[:2])
    assert float(scores[0]) == pytest.approx(0.0, abs=2e-3)
    assert float(scores[1]) == pytest.approx(0.3 * math.hypot(255, 127.5), abs=2e-3)


def test_brightness_is_the_weighted_mean() -> None:
    images = pictures(4, 9, dtype=torch.float64)
    planes = images.numpy().mean(axis=(2, 3))
    expected = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in planes]
    assert Brightness()(images, PROMPTS).tolist() == pytest.approx(expected, rel=1e-12)
    assert Brightness()(torch.ones(1, 3, 5, 7), PROMPTS[:1]).item() == pytest.approx(1.0)


@pytest.mark.parametrize("reward", [Colourfulness(), Brightness()], ids=lambda reward: reward.name)
def test_gradients_equal_finite_differences(reward: Colourfulness | Brightness) -> None:
    images = pictures(2, 6, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images, PROMPTS[:2]).sum(), images)
    direction, step = torch.randn(images.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64), 1e-6
    with torch.no_grad():
        ahead, behind = (reward(images + sign * step * direction, PROMPTS[:2]).sum() for sign in (1, -1))
    assert float((gradient * direction).sum()) == pytest.approx(float(ahead - behind) / (2 * step), rel=1e-6)


def test_a_grey_picture_has_a_finite_colourfulness_gradient() -> None:
    images = torch.full((1, 3, 8, 8), 0.5, requires_grad=True)
    (gradient,) = torch.autograd.grad(Colourfulness()(images, PROMPTS[:1]).sum(), images)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(
    "reward", [Colourfulness(), Brightness(), JpegCompressibility()], ids=lambda reward: reward.name
)
def test_order_and_company_do_not_change_a_score(reward: Colourfulness | Brightness | JpegCompressibility) -> None:
    images, order = pictures(), torch.tensor([2, 0, 3, 1])
    together = reward(images, PROMPTS)
    alone = torch.cat([reward(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(4)])
    assert torch.allclose(together, alone, rtol=1e-6)
    assert torch.allclose(reward(images[order], [PROMPTS[i] for i in order]), together[order], rtol=1e-6)


# -- Scorer --------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=4))
def test_the_score_is_the_weighted_sum(weights: list[float]) -> None:
    members = [(Fake(lambda images, _, c=index % 3: images[:, c].amax((1, 2))), w) for index, w in enumerate(weights)]
    images = pictures()
    expected = sum(w * images.numpy()[:, index % 3].max(axis=(1, 2)) for index, w in enumerate(weights))
    assert np.allclose(Scorer(members)(images, PROMPTS).numpy(), expected, atol=1e-5)


def test_each_names_every_member_and_counts_pictures_once() -> None:
    scorer = load_scorer(
        [
            RewardEntry(reward=Brightness(), weight=2.0),
            RewardEntry(reward=Brightness()),
            RewardEntry(reward=Colourfulness()),
        ],
        "cpu",
    )
    images = pictures()
    each = scorer.each(images, PROMPTS)
    assert list(each) == ["brightness", "brightness#2", "colourfulness"]
    assert scorer.queries == 4
    total = scorer(images, PROMPTS)
    assert torch.allclose(total, 3 * each["brightness"] + each["colourfulness"])
    assert total.dtype == torch.float32
    assert (scorer.queries, scorer.invalid) == (8, 0)


def test_each_keeps_apart_what_has_the_same_name() -> None:
    members = [(Fake(red, name=name), 1.0) for name in ("a#1", "a#1", "a", "a", "a")]
    assert list(Scorer(members).each(pictures(), PROMPTS)) == ["a#1", "a#1#2", "a", "a#2", "a#3"]


def test_a_gradient_passes_where_it_is_asked_for_and_only_there() -> None:
    scorer = Scorer([(Fake(red, differentiable=True), 2.0)])
    images = pictures().requires_grad_()
    (gradient,) = torch.autograd.grad(scorer(images, PROMPTS).sum(), images)
    assert torch.allclose(gradient[:, 0], torch.full((4, 24, 24), 2 / 24**2))
    assert not scorer(images.detach(), PROMPTS).requires_grad
    with torch.no_grad():
        assert not scorer(images, PROMPTS).requires_grad


def test_a_reward_with_trained_weights_builds_no_graph_when_nobody_asks() -> None:
    weight = torch.ones(1, requires_grad=True)
    scorer = Scorer([(Fake(lambda images, prompts: red(images, prompts) * weight), 1.0)])
    assert not scorer(pictures(), PROMPTS).requires_grad


def test_asking_for_a_gradient_that_is_not_there() -> None:
    images = pictures().requires_grad_()
    with pytest.raises(RewardError, match=r"'jpeg_compressibility' has no gradient.*algorithm\.guidance"):
        Scorer([(JpegCompressibility(), 1.0)])(images, PROMPTS)
    liar = Fake(lambda images, prompts: red(images.detach(), prompts), differentiable=True)
    with pytest.raises(RewardError, match=r"does not depend on the pictures"):
        Scorer([(liar, 1.0)])(images, PROMPTS)
    mixed = Scorer([(Fake(red, differentiable=True), 1.0), (JpegCompressibility(), 1.0)])
    assert not mixed.differentiable
    with pytest.raises(RewardError, match="jpeg_compressibility"):
        mixed(images, PROMPTS)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda images, prompts: images.mean(), r"shape \(4,\); it returned shape \(\)"),
        (lambda images, prompts: images.mean((2, 3)), r"returned shape \(4, 3\).*One number per picture"),
        (lambda images, prompts: images.mean((1, 2, 3))[:, None], r"returned shape \(4, 1\).*flatten"),
        (lambda images, prompts: torch.ones(4, dtype=torch.int64), r"dtype torch\.int64\. Add \.float\(\)"),
        (lambda images, prompts: [0.1, 0.2, 0.3, 0.4], r"it returned a list"),
        (lambda images, prompts: None, r"it returned a NoneType"),
        (lambda images, prompts: 1 / 0, r"'fake' raised ZeroDivisionError: division by zero"),
    ],
)
def test_a_reward_that_misbehaves_is_named_and_explained(
    function: Callable[[Tensor, Sequence[str]], object], message: str
) -> None:
    scorer = Scorer([(Brightness(), 1.0), (Fake(function), 1.0)])
    with pytest.raises(RewardError, match=message) as caught:
        scorer(pictures(), PROMPTS)
    assert "'fake'" in str(caught.value)
    assert "shape (4, 3, 24, 24), dtype torch.float32, values" in str(caught.value)
    assert scorer.queries == 0


def test_ctrl_c_inside_a_reward_is_not_swallowed() -> None:
    def stop(images: Tensor, prompts: Sequence[str]) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Scorer([(Fake(stop), 1.0)])(pictures(), PROMPTS)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_stop_or_are_skipped(bad: float) -> None:
    def sometimes(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return red(images, prompts).masked_fill(torch.tensor([prompt == "a dog" for prompt in prompts]), bad)

    with pytest.raises(RewardError, match=r"for 1 of 4 pictures, the first for the prompt 'a dog'.*\n.*\n.*skip"):
        Scorer([(Fake(sometimes), 1.0)])(pictures(), PROMPTS)
    scorer = Scorer([(Brightness(), 1.0), (Fake(sometimes), 0.5)], on_invalid="skip")
    scores = scorer(pictures(), PROMPTS)
    assert torch.isnan(scores).tolist() == [False, True, False, False]
    assert (scorer.queries, scorer.invalid) == (4, 1)
    assert all(
        torch.isnan(score).tolist() == [False, True, False, False]
        for score in scorer.each(pictures(), PROMPTS).values()
    )


def test_a_patient_scorer_refuses_pictures_on_the_way_with_the_next_call_or_when_asked() -> None:
    def sometimes(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return red(images, prompts).masked_fill(torch.tensor([prompt == "a dog" for prompt in prompts]), math.nan)

    scorer, said = Scorer([(Fake(sometimes), 1.0)]), "the first for the prompt 'a dog'"
    with pytest.raises(RewardError, match=said):  # not patient
        scorer.at(500)(pictures(), PROMPTS)
    scorer.patient = True
    for ask in (
        scorer.settle,
        lambda: scorer.at(400)(pictures()[:1], ["a cat"]),
        lambda: scorer(pictures()[:1], ["a"]),
    ):
        assert torch.isnan(scorer.at(500)(pictures(), PROMPTS)).tolist() == [False, True, False, False]
        with pytest.raises(RewardError, match=said):
            ask()
        scorer.settle()  # once is enough
    with pytest.raises(RewardError, match=said):  # finished pictures are looked at at once
        scorer(pictures(), PROMPTS)

    skipping = Scorer([(Fake(sometimes), 1.0)], on_invalid="skip")
    skipping.patient = True
    for known in (0, 1, 2):
        skipping.at(500)(pictures(), PROMPTS)
        assert skipping.invalid == known
    skipping.settle()
    assert skipping.invalid == 3


def test_pictures_that_are_not_finite_are_the_models_fault_and_never_get_a_number() -> None:
    images = pictures()
    images[1, 0, 0, 0] = math.nan
    with pytest.raises(DivergedError, match=r"1 of 4 pictures.*'a dog': the model diverged"):
        Scorer([(JpegCompressibility(), 1.0)])(images, PROMPTS)
    scorer = Scorer([(JpegCompressibility(), 1.0)], on_invalid="skip")
    assert torch.isnan(scorer(images, PROMPTS)).tolist() == [False, True, False, False]
    assert scorer.invalid == 1


def test_skipped_rows_do_not_spoil_the_gradient_of_the_others() -> None:
    def divide(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return red(images, prompts) / torch.tensor([1.0, 0.0, 1.0, 1.0])

    images = pictures().requires_grad_()
    scores = Scorer([(Fake(divide, differentiable=True), 1.0)], on_invalid="skip")(images, PROMPTS)
    (gradient,) = torch.autograd.grad(scores[torch.isfinite(scores)].sum(), images)
    assert torch.isfinite(gradient[[0, 2, 3]]).all()
    assert (gradient[0] != 0).any()


def test_mistakes_of_the_caller() -> None:
    scorer = Scorer([(Brightness(), 1.0)])
    with pytest.raises(ValueError, match="3 prompts"):
        scorer(pictures(), PROMPTS[:3])
    with pytest.raises(ValueError, match="uint8"):
        scorer((pictures() * 255).byte(), PROMPTS)
    with pytest.raises(ValueError, match="at least one"):
        Scorer([])
    with pytest.raises(ValueError, match="finite"):
        Scorer([(Brightness(), math.inf)])
    with pytest.raises(ValueError, match="finite"):
        RewardEntry(reward=Brightness(), weight=math.nan)


def test_half_and_double_precision_scores_come_back_as_float32() -> None:
    for dtype in (torch.bfloat16, torch.float64):
        scores = Scorer([(Fake(lambda images, prompts, d=dtype: red(images, prompts).to(d)), 1.0)])(pictures(), PROMPTS)
        assert scores.dtype == torch.float32


def test_the_list_of_rewards_tells_the_truth() -> None:
    rows = {row.name: row for row in describe_rewards()}
    assert list(rows) == [
        "emoji_preference",
        "emoji_step_preference",
        "emoji_judge",
        "clip_preference",
        "aesthetic",
        "image_reward",
        "hpsv2",
        "pickscore",
        "clip_score",
        "hpsv3",
        "ocr",
        "vision_judge",
        "remote",
        "jpeg_compressibility",
        "jpeg_incompressibility",
        "colourfulness",
        "brightness",
        "package.module:attribute",
    ]
    assert rows["jpeg_compressibility"].differentiable is False
    assert rows["emoji_preference"].differentiable is EmojiPreference().differentiable is True
    assert all(row.summary and row.needs and row.units and row.source for row in rows.values())
