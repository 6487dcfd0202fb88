"""Pictures survive the way to a PNG file and back; sheets hold what they were given."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tailorpo.errors import StorageError, UserError
from tailorpo.images import contact_sheet, fit, from_pil, load_png, png_bytes, save_png, to_pil, to_uint8


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_rounding_is_to_the_nearest_of_256_levels() -> None:
    image = noise(3, 9, 7)
    # numpy.rint in float64 is the oracle; both round half to even
    assert np.array_equal(to_uint8(image).numpy(), np.rint(image.numpy().astype(np.float64) * 255).astype(np.uint8))


def test_values_outside_and_nan_are_clamped() -> None:
    image = torch.tensor([-3.0, 0.0, 1.0, 7.0, float("nan"), float("inf"), float("-inf")]).reshape(1, 1, 7)
    assert to_uint8(image).flatten().tolist() == [0, 0, 255, 255, 0, 255, 0]


def test_channels_and_rows_are_not_swapped() -> None:
    image = torch.zeros(3, 4, 6)
    image[0, 1, 5] = 1.0  # red, row 1, column 5
    assert to_pil(image).size == (6, 4)
    assert to_pil(image).getpixel((5, 1)) == (255, 0, 0)
    assert torch.equal(from_pil(to_pil(image)), image)


def test_round_trip_through_a_file_is_exact_on_8_bit_values(tmp_path: Path) -> None:
    image = to_uint8(noise(3, 12, 16)).float() / 255
    path = save_png(image, tmp_path / "new" / "folder" / "a.png")
    assert torch.equal(load_png(path), image)
    assert path.read_bytes() == png_bytes(load_png(path))
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]  # no temporary file is left


def test_half_a_rounding_step_is_the_largest_error(tmp_path: Path) -> None:
    image = noise(3, 32, 32, seed=1)
    assert (load_png(save_png(image, tmp_path / "a.png")) - image).abs().max() <= 1 / 510 + 1e-6


def test_a_refused_write_is_a_storage_error_and_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_png(noise(3, 4, 4), tmp_path / "a.png")
    before = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"cannot write .*a\.png: the disk is full"):
        save_png(noise(3, 4, 4, seed=2), path)
    assert path.read_bytes() == before


def test_unreadable_pictures_are_user_errors(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    for name in ("text.png", "missing.png"):
        with pytest.raises(UserError, match=name):
            load_png(tmp_path / name)


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(1, 4, 4\)"):
        to_pil(torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match=r"captions"):
        contact_sheet([torch.zeros(3, 4, 4)], ["a", "b"], columns=2)
    with pytest.raises(ValueError, match=r"0 pictures"):
        contact_sheet([], columns=2)


def test_enlarging_repeats_pixels_by_a_whole_factor() -> None:
    image = to_uint8(noise(3, 5, 5)).float() / 255
    enlarged = from_pil(fit(image, 18))
    assert torch.equal(enlarged, image.repeat_interleave(3, 1).repeat_interleave(3, 2))
    assert fit(noise(3, 100, 50), 20).size == (10, 20)


def test_a_contact_sheet_shows_every_picture_in_order() -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    pictures = [Image.new("RGB", (8, 8), colour) for colour in colours]
    sheet = contact_sheet(pictures, ["a cat", "word " * 500, "x" * 500], columns=2, cell=64, title="three")
    centres: dict[tuple[int, ...], tuple[float, float]] = {}
    data = np.asarray(sheet)
    for colour in colours:
        rows, columns = np.nonzero((data == colour).all(-1))
        assert len(rows) == 64 * 64
        centres[colour] = (float(rows.mean()), float(columns.mean()))
    red, green, blue = (centres[colour] for colour in colours)
    assert red[0] == green[0] < blue[0]
    assert red[1] == blue[1] < green[1]
