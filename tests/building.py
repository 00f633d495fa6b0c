"""Building groundkern in a copy of its sources, so that the checkout's own build is not touched."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "CHANGELOG.md", "README.md")
FOLDERS = ("csrc", "groundkern")
NO_COMPILER = "/nonexistent/g++"


def copy_sources(folder: Path) -> Path:
    """What is needed to build, without what builds left; returns `folder`, which it makes."""
    folder.mkdir(parents=True)
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "_C.py")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in SOURCES:
        shutil.copy2(ROOT / name, folder / name)
    return folder


def run(arguments: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh Python without PYTHONPATH: it sees `folder` and what is installed."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "GROUNDKERN_WERROR")}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=folder, env={**env, **environment}, capture_output=True, text=True
    )


def build(kind: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`kind` is "wheel" or "sdist"; the result is in `folder / "dist"`."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}('dist')"
    return run(["-c", code], folder, **environment)


def wheel_names(folder: Path) -> list[str]:
    """Of the wheel in `folder / "dist"`, which is unpacked into `folder / "installed"`."""
    (wheel,) = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "installed")
        return archive.namelist()
