"""Pictures in and out: tensors in [0, 1] to PNG files and back, and contact sheets to look at.

    save_png(image, path)                               one picture, (3, H, W) in [0, 1]
    load_png(path)                                      and back
    contact_sheet(images, captions, columns=4).save()   many, enlarged and captioned

Rounding: a channel value v becomes round(255 v), half to even, after clamping to [0, 1]; reading divides by 255. So a
written and re-read picture differs by at most 1/510 per channel, and writing it again gives the same bytes.

Small pictures are enlarged by whole factors without interpolation, so that what one sees is what the model drew; larger
ones are reduced with Lanczos. Left out: metadata in the PNG files (a file depends on its pixels alone), other formats.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tailorpo.errors import UserError
from tailorpo.files import atomic_write

Picture = Tensor | Image.Image

_PAPER = (255, 255, 255)
_INK = (34, 34, 34)
_FAINT = (215, 215, 215)


def to_uint8(images: Tensor) -> Tensor:
    """Channel values 0..255 of pictures in [0, 1], any shape, on the CPU; NaN becomes 0."""
    values = images.detach().to("cpu", torch.float32).nan_to_num(nan=0.0, posinf=1.0, neginf=0.0)
    return values.clamp(0, 1).mul(255).round().to(torch.uint8)


def to_pil(image: Picture) -> Image.Image:
    """The Pillow picture of a tensor (3, H, W) in [0, 1]; a Pillow picture passes through as RGB.

    Raises:
        ValueError: the tensor is not (3, H, W).
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"a picture must be (3, height, width), got {tuple(image.shape)}")
    return Image.fromarray(to_uint8(image).permute(1, 2, 0).contiguous().numpy())


def from_pil(image: Image.Image) -> Tensor:
    """The tensor (3, H, W) float32 in [0, 1] of a Pillow picture."""
    rgb = image.convert("RGB")
    data = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
    return data.view(rgb.height, rgb.width, 3).permute(2, 0, 1).float().div(255)


def png_bytes(image: Picture) -> bytes:
    """The PNG file of one picture."""
    buffer = io.BytesIO()
    to_pil(image).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def save_png(image: Picture, path: Path) -> Path:
    """Write one picture; the file is there complete or not at all. Makes the folder.

    Raises:
        StorageError: the disk refused.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, png_bytes(image))
    return path


def load_png(path: Path) -> Tensor:
    """Read a picture as (3, H, W) float32 in [0, 1].

    Raises:
        UserError: the file is missing or is not a picture.
    """
    try:
        with Image.open(path) as image:
            return from_pil(image)
    except OSError as error:  # Pillow's UnidentifiedImageError is one too
        raise UserError(f"cannot read the picture {path}: {error}") from error


def fit(image: Picture, size: int) -> Image.Image:
    """A picture at most `size` pixels long: enlarged by a whole factor with hard pixels, or reduced with Lanczos."""
    picture = to_pil(image)
    longer = max(picture.size)
    if longer <= size:
        factor = size // longer
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    scale = size / longer
    reduced = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(reduced, Image.Resampling.LANCZOS)


def contact_sheet(
    images: Sequence[Picture], captions: Sequence[str] = (), *, columns: int, cell: int = 128, title: str = ""
) -> Image.Image:
    """Pictures in rows, left to right, each in a square of `cell` pixels with its caption (two lines at most) below.

    Args:
        images: at least one picture, (3, H, W) in [0, 1] or Pillow; sizes may differ.
        captions: none, or one per picture; characters the bundled font lacks are drawn as boxes.
        columns: pictures per row.
        cell: side of the square that a picture is fitted into.
        title: a line above all.

    Raises:
        ValueError: no pictures, no columns, or a wrong number of captions.
    """
    if not images or columns < 1 or cell < 1:
        raise ValueError(f"got {len(images)} pictures, {columns} columns and cells of {cell}; each must be at least 1")
    if captions and len(captions) != len(images):
        raise ValueError(f"{len(images)} pictures but {len(captions)} captions")
    font, heading = ImageFont.load_default(size=12), ImageFont.load_default(size=16)
    gap, line = 10, 15
    wrapped = [_wrap(caption, font=font, width=cell) for caption in captions]
    text_height = line * max((len(lines) for lines in wrapped), default=0) + (4 if any(wrapped) else 0)
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    top = gap + (26 if title else 0)
    sheet = Image.new("RGB", (gap + columns * (cell + gap), top + rows * (cell + text_height + gap)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((gap, gap), _shorten(title, font=heading, width=sheet.width - 2 * gap), fill=_INK, font=heading)
    for index, image in enumerate(images):
        left = gap + (index % columns) * (cell + gap)
        upper = top + (index // columns) * (cell + text_height + gap)
        picture = fit(image, cell)
        corner = (left + (cell - picture.width) // 2, upper + (cell - picture.height) // 2)
        sheet.paste(picture, corner)
        frame = (corner[0] - 1, corner[1] - 1, corner[0] + picture.width, corner[1] + picture.height)
        draw.rectangle(frame, outline=_FAINT)
        for row, text in enumerate(wrapped[index] if wrapped else ()):
            draw.text((left, upper + cell + 4 + row * line), text, fill=_INK, font=font)
    return sheet


_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def _shorten(text: str, *, font: _Font, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."


def _wrap(text: str, *, font: _Font, width: int, lines: int = 2) -> list[str]:
    """Words in at most `lines` lines of the given width; what does not fit is cut with three dots."""
    # A prompt may be a page long; more than this never fits in two lines and would only take time.
    words, wrapped = text[: 16 * width].split(), list[str]()
    while words and len(wrapped) < lines - 1:
        count = 1
        while count < len(words) and font.getlength(" ".join(words[: count + 1])) <= width:
            count += 1
        wrapped.append(_shorten(" ".join(words[:count]), font=font, width=width))
        words = words[count:]
    return [*wrapped, _shorten(" ".join(words), font=font, width=width)] if words else wrapped
