"""setup.py: what a wheel contains, and how the install goes without a usable C++ compiler.

Each build runs in a copy of the sources, so that the checkout's own build is not touched.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("setup.py", "pyproject.toml", "LICENSE", "csrc", "groundkern")
GXX = shutil.which("g++")
AARCH64 = "aarch64-linux-gnu-g++"
needs_gxx = pytest.mark.skipif(GXX is None, reason="builds with g++ and there is none on PATH")

# Stands in for g++ and logs its arguments. On our own sources it fails if OURS is "fail" and writes
# an empty file if it is "empty"; else it compiles without optimising: the kernels are tested
# elsewhere.
WRAPPER = """#!/bin/sh
echo "$@" >> "$COMPILER_LOG"
case "$OURS $*" in
  fail*csrc*) echo "csrc: no" >&2; exit 1 ;;
  empty*csrc*) while [ "$1" != -o ]; do shift; done; : > "$2"; exit 0 ;;
esac
exec {gxx} "$@" -O0
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what is needed to build, in a folder with a space in its name."""
    folder = tmp_path / "a checkout"
    folder.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "_C.py")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignore)
        else:
            shutil.copy2(source, folder / name)
    (folder / "README.md").write_text("# groundkern\n")
    return folder


@pytest.fixture
def wrapper(tmp_path: Path) -> Path:
    path = tmp_path / "compiler"
    path.write_text(WRAPPER.format(gxx=GXX))
    path.chmod(0o755)
    return path


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
    (wheel,) = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "installed")
        return archive.namelist()


IMPORT = ["-c", "import groundkern._C as extension; print(extension.__file__)"]


def test_the_extension_is_built_here() -> None:
    """If there is a compiler, the tests run with the native kernels."""
    if GXX is None:
        pytest.skip("there is no g++ to build groundkern._C with")
    result = run(IMPORT, ROOT)
    assert result.returncode == 0, f"build it with `pip install -e .`: {result.stderr}"
    assert result.stdout.strip().endswith(sysconfig.get_config_var("EXT_SUFFIX"))


def test_wheel_without_a_compiler(checkout: Path) -> None:
    """The install succeeds and says what is missing, and so does the installed package."""
    result = build("wheel", checkout, CXX="/nonexistent/g++")
    assert result.returncode == 0, result.stderr
    sentence = "no C++ compiler was found (/nonexistent/g++)"
    assert f"installing without its C++ kernels: {sentence}" in result.stderr

    names = wheel_names(checkout)
    code = [name for name in names if ".dist-info/" not in name]
    assert {"groundkern/__init__.py", "groundkern/hf/__init__.py", "groundkern/_C.py"} <= set(code)
    assert {name.split("/")[0] for name in code} == {"groundkern"}
    kinds = {Path(name).suffix for name in code}
    assert kinds == {".py", ".html", ".css", ".yaml", ".txt", ".csv", ".md"}, "no object file"
    assert any(name.endswith("licenses/LICENSE") for name in names)

    ask = "import groundkern; print(groundkern.available_backends()['native'])"
    reason = run(["-c", ask], checkout / "installed")
    assert sentence in reason.stdout, reason.stderr


def test_wheel_with_an_unusable_compiler(checkout: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'unknown dialect' >&2\nexit 1\n")
    broken.chmod(0o755)
    result = build("wheel", checkout, CXX=str(broken))
    assert result.returncode == 0, result.stderr
    assert "cannot build a C++17 extension (unknown dialect)" in result.stderr
    assert "groundkern/_C.py" in wheel_names(checkout)


@pytest.mark.long
@needs_gxx
def test_wheel_with_a_compiler(checkout: Path, wrapper: Path, tmp_path: Path) -> None:
    """The extension replaces an earlier build's stand-in and imports; its flags are portable."""
    build("wheel", checkout, CXX="/nonexistent/g++")
    shutil.rmtree(checkout / "dist")
    log = tmp_path / "log"
    environment = {"CXX": str(wrapper), "COMPILER_LOG": str(log), "GROUNDKERN_WERROR": "1"}
    result = build("wheel", checkout, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    extension = "groundkern/_C" + sysconfig.get_config_var("EXT_SUFFIX")
    names = wheel_names(checkout)
    assert extension in names and "groundkern/_C.py" not in names
    imported = run(IMPORT, checkout / "installed")
    assert imported.stdout.strip() == str(checkout / "installed" / extension), imported.stderr

    compiled = [line for line in log.read_text().splitlines() if "csrc" in line and " -c " in line]
    assert len(compiled) == len(list((ROOT / "csrc").rglob("*.cpp")))
    for line in compiled:
        flags = line.split()
        assert {"-O3", "-std=c++17", "-fopenmp", "-Wall", "-Wextra", "-Werror"} <= set(flags)
        assert not any(flag.startswith("-march") or "torch" in flag for flag in flags)


@pytest.mark.long
@pytest.mark.skipif(
    shutil.which(AARCH64) is None, reason=f"compiles for aarch64 with {AARCH64}, which is not here"
)
def test_the_kernels_compile_for_aarch64(tmp_path: Path) -> None:
    """All but the binding, which needs that machine's Python; with the flags of a build."""
    flags = ["-O1", "-std=c++17", "-fPIC", "-fopenmp", "-Wall", "-Wextra", "-Werror"]
    for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        command = [AARCH64, *flags, "-c", str(source), "-o", str(tmp_path / "object.o")]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr


@needs_gxx
def test_an_error_in_our_sources_fails_the_build(
    checkout: Path, wrapper: Path, tmp_path: Path
) -> None:
    """It is not mistaken for a missing compiler."""
    environment = {"CXX": str(wrapper), "COMPILER_LOG": str(tmp_path / "log"), "OURS": "fail"}
    result = build("wheel", checkout, **environment)
    assert result.returncode != 0
    assert "csrc: no" in result.stdout + result.stderr
    assert not list((checkout / "dist").glob("*.whl"))


@needs_gxx
def test_an_in_place_build_removes_the_stand_in(
    checkout: Path, wrapper: Path, tmp_path: Path
) -> None:
    command = ["setup.py", "build_ext", "--inplace"]
    without = run(command, checkout, CXX="/nonexistent/g++")
    assert without.returncode == 0, without.stderr
    missing = run(IMPORT, checkout)
    assert "ImportError: not built: no C++ compiler was found" in missing.stderr

    environment = {"CXX": str(wrapper), "COMPILER_LOG": str(tmp_path / "log"), "OURS": "empty"}
    built = run(command, checkout, **environment)
    assert built.returncode == 0, built.stdout + built.stderr
    extension = "_C" + sysconfig.get_config_var("EXT_SUFFIX")
    assert [path.name for path in (checkout / "groundkern").glob("_C*")] == [extension]


def test_sdist_holds_the_sources_of_the_extension(checkout: Path) -> None:
    result = build("sdist", checkout)
    assert result.returncode == 0, result.stderr
    (archive,) = (checkout / "dist").glob("*.tar.gz")
    shutil.unpack_archive(archive, checkout / "unpacked")
    (unpacked,) = (checkout / "unpacked").iterdir()
    for source in (checkout / "csrc").rglob("*.*"):
        assert (unpacked / source.relative_to(checkout)).is_file(), source
    assert (unpacked / "setup.py").is_file()
