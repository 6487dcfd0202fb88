"""The training pictures: glyphs rendered from freely licensed SVG sets, then shown in a messy world.

Stages: fetch the icon sets from npm, render every glyph once, and from then on draw 64x64 pictures on the fly. About
half of the pictures are damaged (blurred, faded, tiny, off-centre, noisy, JPEG-torn) and the captions never say so:
this is the headroom that alignment is there to use.
"""

from __future__ import annotations

import io
import json
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image, ImageFilter

from miniature.concepts import BACKGROUNDS, CONCEPTS, STYLES
from miniature.place import CACHE

PACKAGES = {"noto": "1.2.9", "fluent-emoji": "1.2.7", "twemoji": "1.2.5"}
"""npm versions of `@iconify-json/<name>`."""
GLYPH = 128
SIZE = 64

DAMAGES: dict[str, float] = {
    "none": 0.52,
    "blur": 0.14,
    "faded": 0.10,
    "dark": 0.05,
    "tiny": 0.07,
    "off-centre": 0.07,
    "noise": 0.03,
    "jpeg": 0.02,
}
"""How often each kind of damage befalls a training picture."""


@dataclass(frozen=True, kw_only=True)
class Glyphs:
    """All rendered glyphs: premultiplied RGBA pictures and, per glyph, its concept, style and pose."""

    pictures: np.ndarray
    concept: np.ndarray
    style: np.ndarray
    pose: np.ndarray

    def of(self, concept: int, styles: tuple[int, ...] | None = None) -> np.ndarray:
        """Indices of the glyphs that show a concept, in the given styles only if any are given."""
        mask = self.concept == concept
        if styles is not None:
            mask &= np.isin(self.style, styles)
        return np.flatnonzero(mask)


@dataclass(frozen=True, kw_only=True)
class View:
    """Everything that turns a glyph into one picture. `strength` runs from 0 (slight) to 1 (severe damage)."""

    glyph: int
    scale: float
    shift: tuple[float, float]
    background: str | None
    damage: str
    strength: float
    seed: int


def fetch_icons() -> Path:
    """Installs the pinned icon sets with npm into the cache (once) and returns their folder."""
    folder = CACHE / "npm" / "node_modules" / "@iconify-json"
    if not all((folder / name / "icons.json").exists() for name in PACKAGES):
        (CACHE / "npm").mkdir(parents=True, exist_ok=True)
        specs = [f"@iconify-json/{name}@{version}" for name, version in PACKAGES.items()]
        subprocess.run(["npm", "install", "--prefix", str(CACHE / "npm"), "--no-save", *specs], check=True)
    return folder


def _render(icons: dict, name: str) -> np.ndarray:
    """Renders one icon to a premultiplied RGBA picture whose longer side fills the frame."""
    alias = icons.get("aliases", {}).get(name)
    icon = icons["icons"][alias["parent"] if alias else name]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    left, top = icon.get("left", 0), icon.get("top", 0)
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="256" height="256">{icon["body"]}</svg>'
    )
    image = Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True))).convert("RGBa")
    box = image.getchannel("a").getbbox()
    assert box is not None, f"{name} renders to nothing"
    side = max(box[2] - box[0], box[3] - box[1])
    centre = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    corner = (round(centre[0] - side / 2), round(centre[1] - side / 2))
    image = image.crop((corner[0], corner[1], corner[0] + side, corner[1] + side))
    return np.asarray(image.resize((GLYPH, GLYPH), Image.Resampling.LANCZOS))


@lru_cache(maxsize=1)
def load_glyphs() -> Glyphs:
    """Renders all glyphs of all concepts, or reads them from the cache."""
    path = CACHE / "glyphs.npz"
    if not path.exists():
        folder = fetch_icons()
        pictures, labels = [], []
        for s, style in enumerate(STYLES):
            icons = json.loads((folder / style / "icons.json").read_text())
            for c, concept in enumerate(CONCEPTS):
                if s >= (3 if "animal" in concept.group else 2):
                    continue  # animals, which alignment works on, get all styles; the rest two, to spare the budget
                for p, name in enumerate(concept.glyphs):
                    pictures.append(_render(icons, name))
                    labels.append((c, s, p))
        c, s, p = np.array(labels).T
        np.savez(path, pictures=np.stack(pictures), concept=c, style=s, pose=p)
    return Glyphs(**np.load(path))


def sample_view(rng: np.random.Generator, glyph: int, *, damage: str | None = None, colour: float = 0.2) -> View:
    """Draws how a glyph is shown; `colour` is the share of coloured (and captioned) backgrounds."""
    if damage is None:
        damage = str(rng.choice(list(DAMAGES), p=list(DAMAGES.values())))
    scale = rng.uniform(0.84, 0.95)
    shift = (rng.uniform(-2, 2), rng.uniform(-2, 2))
    if damage == "tiny":
        scale = rng.uniform(0.32, 0.5)
        shift = (rng.uniform(-4, 4), rng.uniform(-4, 4))
    elif damage == "off-centre":
        angle, radius = rng.uniform(0, 2 * np.pi), rng.uniform(16, 26)
        shift = (radius * np.cos(angle), radius * np.sin(angle))
    background = str(rng.choice(list(BACKGROUNDS))) if rng.random() < colour else None
    return View(
        glyph=glyph,
        scale=scale,
        shift=shift,
        background=background,
        damage=damage,
        strength=rng.random(),
        seed=int(rng.integers(2**31)),
    )


def draw(view: View, glyphs: Glyphs) -> np.ndarray:
    """Draws the picture of a view: uint8, (64, 64, 3)."""
    rng = np.random.default_rng(view.seed)
    side = max(4, round(view.scale * SIZE))
    glyph = Image.fromarray(glyphs.pictures[view.glyph], "RGBa").resize((side, side), Image.Resampling.BOX)
    canvas = Image.new("RGBa", (SIZE, SIZE))
    canvas.paste(glyph, (round((SIZE - side) / 2 + view.shift[0]), round((SIZE - side) / 2 + view.shift[1])))
    rgba = np.asarray(canvas).astype(np.float32) / 255
    if view.background is None:
        colour = np.full(3, rng.uniform(0.97, 1.0), np.float32)
    else:
        colour = np.array(BACKGROUNDS[view.background], np.float32) / 255 * rng.uniform(0.93, 1.05)
    picture = np.minimum(rgba[..., :3] + (1 - rgba[..., 3:]) * colour, 1)
    return _damage(picture, view, colour, rng)


def _damage(picture: np.ndarray, view: View, colour: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    strength = view.strength
    if view.damage == "faded":
        picture = colour + (picture - colour) * (0.5 - 0.3 * strength)
    elif view.damage == "dark":
        picture = picture * (0.5 - 0.25 * strength)
    elif view.damage == "noise":
        picture = picture + rng.normal(0, 0.08 + 0.12 * strength, picture.shape)
    image = Image.fromarray((np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8))
    if view.damage == "blur":
        image = image.filter(ImageFilter.GaussianBlur(1.3 + 1.7 * strength))
    elif view.damage == "jpeg":
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=round(12 - 9 * strength))
        image = Image.open(buffer)
    return np.asarray(image)


def caption(rng: np.random.Generator, view: View, glyphs: Glyphs) -> str:
    """A caption of a view: the word, its background if it has one, and nothing about quality, style or pose."""
    concept = CONCEPTS[glyphs.concept[view.glyph]]
    text = concept.prompt if rng.random() < 0.75 else concept.word
    return text if view.background is None else f"{text} on a {article(view.background)}"


def article(colour: str) -> str:
    """The end of a caption that names a background."""
    return f"{colour} background"


GROUP_WEIGHTS = {"animal": 2.0, "unseen animal": 2.0, "shape": 0.5, "face": 0.8}
"""How often a group's concepts are drawn, against 1: alignment works on animals; shapes are learnt at once."""


@lru_cache(maxsize=1)
def concept_weights() -> np.ndarray:
    """The probability of each concept in the training pictures."""
    weights = np.array([GROUP_WEIGHTS.get(c.group, 1.0) for c in CONCEPTS])
    return weights / weights.sum()


def random_glyph(rng: np.random.Generator, glyphs: Glyphs, *, styles: tuple[int, ...] | None = None) -> int:
    """A glyph of a random concept, by concept weight first, then uniformly among its styles and poses."""
    concept = int(rng.choice(len(CONCEPTS), p=concept_weights()))
    return int(rng.choice(glyphs.of(concept, styles)))
