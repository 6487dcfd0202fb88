"""What is installed: the public names, and a wheel with everything in it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import tailorpo

ROOT = Path(__file__).parents[2]


def test_public_names_are_sorted_exist_and_have_a_docstring() -> None:
    names = [name for name in tailorpo.__all__ if name != "__version__"]
    assert len(set(names)) == len(names)
    assert set(names) == set(tailorpo._HOME)
    for name in names:
        assert getattr(tailorpo, name).__doc__, name
    assert dir(tailorpo) == sorted(tailorpo.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Rnu'"):
        tailorpo.Rnu  # noqa: B018


def test_importing_does_nothing() -> None:
    code = "import sys, tailorpo; sys.exit(any(name in sys.modules for name in ('torch', 'yaml', 'typer', 'rich')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.timeout(600)
def test_the_wheel_and_the_sdist_hold_everything(tmp_path: Path) -> None:
    pytest.importorskip("build")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "src"):
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
        else:
            shutil.copy(path, source / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert list((tmp_path / "dist").glob("*.tar.gz"))  # the wheel is built from it
    assert wheel.stat().st_size < 25e6
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if not name.endswith("/")}
    package = ROOT / "src" / "tailorpo"
    files = {
        f"tailorpo/{path.relative_to(package)}"
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in files if "/assets/" in name and name.endswith(".safetensors")}
    assert files <= inside
    assert any(name.endswith("licenses/LICENSE") for name in inside)
