"""The report in a real browser: self-contained, quiet, readable on a phone, in light and dark."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from browser.chromium import EXECUTABLE, Chromium
from PIL import Image
from synthetic_run import fabricate

from tailorpo.report import write_report
from tailorpo.rundir import RunDirectory

pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason="no Chromium here (apt-get install chromium)")

HOSTILE = (
    "<script>window.broken = 1</script><img src=x onerror='window.broken = 2'>",
    '"><svg onload=window.broken=3> {{ 7 * 7 }} </style></title>',
    "javascript:window.broken=4 " + "unbreakable" * 40,
    "\u732b\u306e\u7d75 \U0001f600 \u202eright-to-left",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with Chromium() as running:
        yield running


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(RunDirectory(fabricate(tmp_path_factory.mktemp("full") / "run", updates=30)))


VARIANTS: dict[str, Callable[[Path], Path]] = {
    "complete": lambda folder: fabricate(folder, updates=12),
    "hostile prompts": lambda folder: fabricate(folder, updates=9, seen=HOSTILE, unseen=HOSTILE[:1]),
    "not evaluated": lambda folder: fabricate(folder, updates=5, target=60, evaluated=False),
    "nothing yet": lambda folder: fabricate(folder, updates=0, target=60, evaluated=False, pairs=False),
    "one update, one prompt": lambda folder: fabricate(folder, updates=1, seen=("a cat",), unseen=(), seeds=1),
    "large pictures": lambda folder: fabricate(folder, updates=2, seen=("a cat",), unseen=(), size=512),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_page_is_self_contained_quiet_and_fits_a_phone(browser: Chromium, tmp_path: Path, variant: str) -> None:
    path = write_report(RunDirectory(VARIANTS[variant](tmp_path / "run")))
    for width in (360, 1280):
        browser.open(path, width=width)
        assert browser.requests() == [path.resolve().as_uri()]
        assert browser.complaints() == []
        assert browser.evaluate("window.broken") is None
        browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        too_wide = (
            "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)"
        )
        assert browser.evaluate(f"{too_wide}.map(e => e.tagName + '.' + e.className)") == []
        images = "Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth)))"
        assert all(size > 0 for size in browser.evaluate(images))
        assert "NaN" not in browser.evaluate("document.body.innerText")


def test_pictures_are_there_in_pairs(browser: Chromium, report: Path) -> None:
    browser.open(report, width=1280)
    for side in ("base", "aligned"):
        assert browser.evaluate(f"document.querySelectorAll('.card figure.{side} img').length") == 12 * 4
    assert browser.evaluate("document.querySelectorAll('.ladder figure.winner img').length") == 3 * 2 * 5
    # 64-pixel pictures are shown at a whole factor on a desktop, so that every pixel is as large as the others
    assert browser.evaluate("document.querySelector('.hero img').getBoundingClientRect().width") == 128


def luminance(browser: Chromium, selector: str, name: str) -> float:
    channels = browser.evaluate(
        f"getComputedStyle(document.querySelector('{selector}')).{name}.match(/[\\d.]+/g).map(Number)"
    )
    return 0.2126 * channels[0] + 0.7152 * channels[1] + 0.0722 * channels[2]


def test_dark_and_light_follow_the_system_and_stay_readable(browser: Chromium, report: Path, tmp_path: Path) -> None:
    means: dict[str, float] = {}
    for scheme in ("light", "dark"):
        browser.open(report, width=1000, scheme=scheme)
        ground, ink = luminance(browser, "body", "backgroundColor"), luminance(browser, "body", "color")
        assert abs(ground - ink) > 150
        assert abs(luminance(browser, ".line.accent", "stroke") - ground) > 60
        browser.screenshot(tmp_path / f"{scheme}.png")
        with Image.open(tmp_path / f"{scheme}.png") as image:
            means[scheme] = float(np.asarray(image.convert("L"), dtype=float).mean())
    assert means["light"] > 180 > 90 > means["dark"]


def test_curves_can_be_read_off(browser: Chromium, report: Path) -> None:
    browser.open(report, width=1280)
    svg = "document.querySelector('svg[aria-label^=\"Seconds per update\"]')"
    legend = f"{svg}.closest('.chart').querySelector('.legend').textContent"
    resting = browser.evaluate(legend)

    def point(kind: str, share: float) -> str:
        browser.evaluate(
            f"(() => {{ const svg = {svg}; svg.scrollIntoView(); const box = svg.getBoundingClientRect();"
            f" const place = {{ clientX: box.left + box.width * {share}, clientY: box.top + 9 }};"
            f" svg.dispatchEvent(new PointerEvent('{kind}', place)); }})()"
        )
        return str(browser.evaluate(legend))

    assert "update 1\n" in point("pointermove", 46 / 360)
    assert "update 30\n" in point("pointermove", 350 / 360)
    assert point("pointerleave", 0.5) == resting


def test_the_page_works_without_scripts(browser: Chromium, report: Path) -> None:
    browser.open(report, width=390, script=False)
    text = browser.evaluate("document.body.innerText")
    for words in ("held-out judge", "Before and after", "Reward gap", "Pairs as they were ranked", "run.yaml"):
        assert words in text
    assert browser.evaluate("document.querySelectorAll('svg path.line').length") > 10
    assert browser.complaints() == []
