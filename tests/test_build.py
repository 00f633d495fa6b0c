"""setup.py: how the build goes with a C++ compiler, without one, and with an unusable one."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from tests.building import NO_COMPILER, ROOT, build, copy_sources, run, wheel_names

EXTENSION = "_C.abi3.so"
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
    return copy_sources(tmp_path / "a checkout")


@pytest.fixture
def wrapper(tmp_path: Path) -> Path:
    path = tmp_path / "compiler"
    path.write_text(WRAPPER.format(gxx=GXX))
    path.chmod(0o755)
    return path


IMPORT = ["-c", "import groundkern._C as extension; print(extension.__file__)"]


def test_the_extension_is_built_here() -> None:
    """If there is a compiler, the tests run with the native kernels."""
    if GXX is None:
        pytest.skip("there is no g++ to build groundkern._C with")
    result = run(IMPORT, ROOT)
    assert result.returncode == 0, f"build it with `pip install -e .`: {result.stderr}"
    assert result.stdout.strip().endswith(EXTENSION)


def test_wheel_without_a_compiler(checkout: Path) -> None:
    """The install succeeds and says what is missing, and so does the installed package."""
    result = build("wheel", checkout, CXX=NO_COMPILER)
    assert result.returncode == 0, result.stderr
    sentence = f"no C++ compiler was found ({NO_COMPILER})"
    assert f"installing without its C++ kernels: {sentence}" in result.stderr

    assert "groundkern/_C.py" in wheel_names(checkout)
    ask = "import groundkern; print(groundkern.available_backends()['native'])"
    reason = run(["-c", ask], checkout / "installed")
    assert sentence in reason.stdout, reason.stderr


def changed(change: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Builds a wheel in a Python that `change` has made look like another."""
    code = f"{change}\nfrom setuptools import build_meta\nbuild_meta.build_wheel('dist')"
    return run(["-c", f"import sys, sysconfig\n{code}"], folder, **environment)


def test_not_on_linux_there_are_no_kernels_and_the_reason_is_told(checkout: Path) -> None:
    change = "import setuptools.command.build_ext\nsysconfig.get_config_vars()"
    result = changed(f"{change}\nsys.platform = 'darwin'", checkout)
    assert result.returncode == 0, result.stderr
    sentence = "the C++ kernels are built on Linux only, and this is darwin"
    assert f"installing without its C++ kernels: {sentence}" in result.stderr
    assert "groundkern/_C.py" in wheel_names(checkout)
    assert sentence in (checkout / "installed/groundkern/_C.py").read_text()


@pytest.mark.long
@needs_gxx
def test_a_free_threaded_python_has_a_build_of_its_own(
    checkout: Path, wrapper: Path, tmp_path: Path
) -> None:
    """There is none here: this one says that it is, and the sources that know Python are compiled
    without the limited API, in which a free-threaded one cannot be served."""
    log = tmp_path / "log"
    environment = {"CXX": str(wrapper), "COMPILER_LOG": str(log), "OURS": "empty"}
    free = "sysconfig.get_config_vars()['Py_GIL_DISABLED'] = 1"
    result = changed(free, checkout, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "this Python is free-threaded, which has no limited API" in result.stderr
    assert "Py_LIMITED_API" not in log.read_text()
    (wheel,) = (checkout / "dist").glob("*.whl")
    assert "abi3" not in wheel.name
    names = [name for name in wheel_names(checkout) if name.startswith("groundkern/_C")]
    assert names == [f"groundkern/_C{sysconfig.get_config_var('EXT_SUFFIX')}", "groundkern/_C.pyi"]

    for name in ("arguments", "module"):
        flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
        include = ["-isystem", sysconfig.get_paths()["include"]]
        command = [GXX, *flags, *include, str(ROOT / "csrc" / f"{name}.cpp")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


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
    build("wheel", checkout, CXX=NO_COMPILER)
    shutil.rmtree(checkout / "dist")
    log = tmp_path / "log"
    environment = {"CXX": str(wrapper), "COMPILER_LOG": str(log), "GROUNDKERN_WERROR": "1"}
    result = build("wheel", checkout, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    extension = f"groundkern/{EXTENSION}"
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
def test_an_in_place_build_removes_what_others_left(
    checkout: Path, wrapper: Path, tmp_path: Path
) -> None:
    command = ["setup.py", "build_ext", "--inplace"]
    without = run(command, checkout, CXX=NO_COMPILER)
    assert without.returncode == 0, without.stderr
    missing = run(IMPORT, checkout)
    assert "ImportError: not built: no C++ compiler was found" in missing.stderr

    (checkout / "groundkern" / "_C.cpython-310-x86_64-linux-gnu.so").touch()  # of an old version
    environment = {"CXX": str(wrapper), "COMPILER_LOG": str(tmp_path / "log"), "OURS": "empty"}
    built = run(command, checkout, **environment)
    assert built.returncode == 0, built.stdout + built.stderr
    assert {path.name for path in (checkout / "groundkern").glob("_C*")} == {EXTENSION, "_C.pyi"}
