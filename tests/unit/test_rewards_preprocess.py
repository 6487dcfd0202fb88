"""Preprocessing against Pillow: every way of fitting, odd sizes, hard edges; gradients against finite differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tailorpo.rewards.preprocess import Preprocess

PLAIN: Any = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def natural(height: int, width: int, *, seed: int = 0) -> np.ndarray:
    """A picture with the spectrum of photos (1/f), correlated channels, a saturated patch with hard edges: uint8."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    falloff = 1 / np.maximum(frequency, 1 / max(height, width))
    noise = rng.standard_normal((4, height, width))
    planes = np.fft.ifft2(np.fft.fft2(0.8 * noise[:1] + 0.2 * noise[1:]) * falloff).real
    planes = 0.5 + 0.2 * (planes - planes.mean()) / planes.std()
    planes[:, height // 4 : height // 2, width // 5 : width // 2] = np.reshape([1.0, 0.0, 0.3], (3, 1, 1))
    return (planes.clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)


def checkerboard(height: int, width: int, *, field: int = 7) -> np.ndarray:
    return np.repeat((np.indices((height, width)) // field).sum(0)[..., None] % 2 * 255, 3, axis=-1).astype(np.uint8)


def tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255


def levels(images: Tensor) -> np.ndarray:
    return images[0].permute(1, 2, 0).double().numpy() * 255


def pillow(pixels: np.ndarray, size: int, *, nearest: bool = False) -> np.ndarray:
    """Resize the shorter side, cut the middle out; the offsets in whole numbers, without rounding functions."""
    height, width = pixels.shape[:2]
    short = min(height, width)
    resized = Image.fromarray(pixels).resize((size * width // short, size * height // short), Image.Resampling.BICUBIC)
    left, top = ((side - size + (nearest and (side - size) % 4 == 3)) // 2 for side in resized.size)
    return np.asarray(resized.crop((left, top, left + size, top + size)), dtype=np.float64)


# -- Pillow --------------------------------------------------------------------------------------------------------

SIZES = [(512, 512), (500, 625), (307, 411), (224, 307), (100, 224), (160, 120)]


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("picture", [natural, checkerboard])
def test_the_default_differs_from_pillow_by_its_rounding_only(picture, height: int, width: int) -> None:
    pixels = picture(height, width)
    difference = np.abs(levels(Preprocess(size=224, **PLAIN)(tensor(pixels))) - pillow(pixels, 224))
    assert difference.max() < 1.1  # half a level in each of two passes, and a little where they overlap
    assert difference.mean() < 0.29


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize(("picture", "exact"), [(natural, 0.999), (checkerboard, 0.98)])
def test_eight_bit_is_pillow_but_for_ties(picture, exact: float, height: int, width: int) -> None:
    pixels = picture(height, width)
    difference = np.abs(levels(Preprocess(size=224, eight_bit=True, **PLAIN)(tensor(pixels))) - pillow(pixels, 224))
    assert difference.max() < 1.001
    assert (difference < 1e-3).mean() > exact  # a checkerboard of two values is full of exact ties


def test_without_antialiasing_it_would_be_another_picture() -> None:
    pixels = natural(512, 512)
    other = Preprocess(size=224, resize="tensor", antialias=False, **PLAIN)(tensor(pixels))
    difference = np.abs(levels(other) - pillow(pixels, 224))
    assert difference.mean() > 1
    assert difference.max() > 30


def test_squash_takes_both_sides_to_the_size() -> None:
    pixels = natural(150, 211)
    expected = np.asarray(Image.fromarray(pixels).resize((96, 96), Image.Resampling.BICUBIC), dtype=np.float64)
    assert np.abs(levels(Preprocess(size=96, fit="squash", **PLAIN)(tensor(pixels))) - expected).max() < 1.1


@pytest.mark.parametrize(("side", "floor", "nearest"), [(307, 41, 42), (305, 40, 40), (306, 41, 41), (224, 0, 0)])
def test_both_ways_of_finding_the_middle(side: int, floor: int, nearest: int) -> None:
    images = torch.arange(side, dtype=torch.float32).expand(1, 3, 224, side)  # the value says which column
    for rounding, first in (("floor", floor), ("nearest", nearest)):
        cut = Preprocess(size=224, crop_rounding=rounding, **PLAIN)(images)  # pyright: ignore[reportArgumentType]
        assert (cut[0, 0, 0, 0], cut[0, 0, 0, -1]) == (first, first + 223)
        turned = Preprocess(size=224, crop_rounding=rounding, **PLAIN)(images.mT)  # pyright: ignore[reportArgumentType]
        assert torch.equal(turned, cut.mT)
    pixels = natural(224, 307)
    for rounding, nearest_ in (("floor", False), ("nearest", True)):
        got = Preprocess(size=224, crop_rounding=rounding, eight_bit=True, **PLAIN)(tensor(pixels))  # pyright: ignore
        assert np.abs(levels(got) - pillow(pixels, 224, nearest=nearest_)).max() < 1e-3


def test_a_larger_shorter_side_leaves_more_to_cut_off() -> None:
    pixels = natural(300, 400)
    resized = Image.fromarray(pixels).resize((4 * 64 // 3, 64), Image.Resampling.BICUBIC).crop((18, 8, 66, 56))
    got = levels(Preprocess(size=48, shorter_side=64, **PLAIN)(tensor(pixels)))
    assert np.abs(got - np.asarray(resized, dtype=np.float64)).max() < 1.1


# -- HPSv2's padding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(512, 300), (211, 512), (100, 37), (224, 224), (224, 100)])
def test_padding_keeps_the_whole_picture_and_normalises_the_zeros(height: int, width: int) -> None:
    images = tensor(natural(height, width))
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    got = Preprocess(size=224, fit="pad", resize="tensor", mean=mean, std=std)(images)[0].permute(1, 2, 0).numpy()
    # Pillow resizes 32-bit floats, too, neither rounding nor clipping them: channel by channel.
    scale = 224 / max(height, width)
    sides = (round(width * scale), round(height * scale))
    planes = [Image.fromarray(plane.numpy()).resize(sides, Image.Resampling.BICUBIC) for plane in images[0]]
    expected = np.zeros((224, 224, 3))
    top, left = (224 - sides[1]) // 2, (224 - sides[0]) // 2
    expected[top : top + sides[1], left : left + sides[0]] = np.stack([np.asarray(p) for p in planes], axis=-1)
    assert np.abs(got - (expected - mean) / std).max() < 1e-4
    if height > width:
        assert np.allclose(got[0, 0], -np.array(mean) / std)


def test_a_tensor_overshoots_at_edges_and_a_pillow_picture_does_not() -> None:
    images = tensor(checkerboard(300, 300, field=40))
    overshot = Preprocess(size=224, fit="pad", resize="tensor", **PLAIN)(images)
    assert overshot.min() < -0.01
    assert overshot.max() > 1.01
    clipped = Preprocess(size=224, **PLAIN)(images)
    assert (clipped.min(), clipped.max()) == (0, 1)


# -- Normalising, types, gradients ---------------------------------------------------------------------------------


def test_normalising_is_by_channel_and_pictures_of_the_right_size_are_left_alone() -> None:
    images = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    got = Preprocess(size=24)(images).numpy()
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    assert np.allclose(got, (images.numpy() - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1)), atol=1e-6)


def test_half_precision_becomes_float32_and_float64_stays() -> None:
    images = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    assert Preprocess(size=24)(images.bfloat16()).dtype == torch.float32
    assert Preprocess(size=24)(images.double()).dtype == torch.float64


@pytest.mark.parametrize(
    "settings",
    [
        {"fit": "crop"},
        {"fit": "pad", "resize": "tensor"},
        {"fit": "pad", "resize": "tensor", "antialias": False},
        {"fit": "squash"},
    ],
)
def test_the_gradient_is_that_of_finite_differences(settings: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    images = 0.3 + 0.4 * torch.rand(1, 3, 9, 13, generator=generator, dtype=torch.float64)  # no clipping
    assert torch.autograd.gradcheck(Preprocess(size=5, **settings), images.requires_grad_())


def test_the_gradient_passes_straight_through_rounding() -> None:
    images = torch.rand(2, 3, 30, 30, generator=torch.Generator().manual_seed(0))
    images = (0.1 + 0.8 * images).requires_grad_()
    weights = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    gradients = [
        torch.autograd.grad((Preprocess(size=16, eight_bit=rounded)(images) * weights).sum(), images)[0]
        for rounded in (False, True)
    ]
    assert torch.isfinite(gradients[1]).all()
    assert torch.allclose(*gradients, atol=1e-5)


@pytest.mark.parametrize("picture", [natural, checkerboard])
def test_the_gradient_is_finite_on_saturated_pictures(picture) -> None:
    for settings in ({}, {"eight_bit": True}, {"fit": "pad", "resize": "tensor"}):
        images = tensor(picture(64, 80)).requires_grad_()
        (gradient,) = torch.autograd.grad(Preprocess(size=32, **settings)(images).square().sum(), images)
        assert torch.isfinite(gradient).all()
        assert gradient.abs().sum() > 0


def test_pictures_do_not_see_each_other() -> None:
    images = torch.cat([tensor(natural(60, 80, seed=seed)) for seed in range(3)])
    together = Preprocess(size=32)(images)
    assert torch.equal(together, torch.cat([Preprocess(size=32)(image[None]) for image in images]))


def test_settings_that_contradict_each_other() -> None:
    with pytest.raises(ValueError, match="Pillow always antialiases"):
        Preprocess(size=224, antialias=False)
    with pytest.raises(ValueError, match="too short to cut 224"):
        Preprocess(size=224, shorter_side=200)
