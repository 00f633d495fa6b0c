"""The wheel and the sdist: what they hold, what they say of themselves, how wheels are made for
every machine. `make wheel` builds the real ones and installs them.

They are built without a compiler, which takes seconds; tests/test_build.py is about compiling.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from email import message_from_string
from pathlib import Path

import pytest

import groundkern
from groundkern.__main__ import NEEDED
from tests.building import (
    FOLDERS,
    NO_COMPILER,
    ROOT,
    SOURCES,
    build,
    copy_sources,
    run,
    wheel_names,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli", reason="reads pyproject.toml: tomllib or tomli")

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
VERSION = PYPROJECT["project"]["version"]
GENERATED = {"PKG-INFO", "setup.cfg"}


def files_of(folder: Path, under: str) -> set[str]:
    return {str(path.relative_to(folder)) for path in (folder / under).rglob("*") if path.is_file()}


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def built(kind: str, folder: Path) -> Path:
    result = build(kind, folder, CXX=NO_COMPILER)
    assert result.returncode == 0, result.stderr
    (made,) = (folder / "dist").glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return made


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    checkout = copy_sources(tmp_path / "checkout")
    expected = files_of(checkout, "groundkern") | {"groundkern/_C.py"}
    wheel = built("wheel", checkout)
    assert re.fullmatch(rf"groundkern-{VERSION}-cp310-abi3-linux_\w+\.whl", wheel.name)

    info = f"groundkern-{VERSION}.dist-info/"
    names = set(wheel_names(checkout))
    assert {name for name in names if not name.startswith(info)} == expected
    assert {f"{info}{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt")} < names
    assert f"{info}licenses/LICENSE" in names
    data = {name for name in names if not name.endswith(".py") and not name.startswith(info)}
    assert {"groundkern/trainer/demo/config.yaml", "groundkern/trainer/templates/style.css"} <= data

    installed = checkout / "installed"
    about = message_from_string((installed / info / "METADATA").read_text(encoding="utf-8"))
    assert about["Version"] == VERSION == groundkern.__version__
    assert about["Requires-Python"] == PYPROJECT["project"]["requires-python"]
    base = [need for need in about.get_all("Requires-Dist") if "extra ==" not in need]
    assert base == PYPROJECT["project"]["dependencies"]
    extras = PYPROJECT["project"]["optional-dependencies"]
    assert set(about.get_all("Provides-Extra")) == set(extras)
    commands = (installed / info / "entry_points.txt").read_text(encoding="utf-8").split()
    assert commands == ["[console_scripts]", "groundkern", "=", "groundkern.__main__:main"]


def test_the_sdist_builds_the_same_wheel(tmp_path: Path) -> None:
    checkout = copy_sources(tmp_path / "checkout")
    sources = {name for folder in FOLDERS for name in files_of(checkout, folder)} | set(SOURCES)
    sdist = built("sdist", checkout)
    subprocess.run(["tar", "-xzf", str(sdist), "-C", str(tmp_path)], check=True)
    unpacked = tmp_path / f"groundkern-{VERSION}"
    held = {name for name in files_of(tmp_path, unpacked.name) if ".egg-info/" not in name}
    assert {name.partition("/")[2] for name in held} == sources | GENERATED

    from_tree, from_sdist = contents(built("wheel", checkout)), contents(built("wheel", unpacked))
    assert from_sdist == from_tree


def test_the_wheels_of_a_release_are_for_every_python_and_processor() -> None:
    """One line of cibuildwheel's table for each Python that the metadata promises."""
    table = PYPROJECT["tool"]["cibuildwheel"]
    promised = re.findall(r":: (3)\.(\d+)$", "\n".join(PYPROJECT["project"]["classifiers"]), re.M)
    machines = ("x86_64", "aarch64")
    wanted = {f"cp{x}{y}-manylinux_{machine}" for x, y in promised for machine in machines}
    assert set(table["build"]) == wanted
    assert "--exclude libgomp.so.1" in table["linux"]["repair-wheel-command"]
    (script,) = re.findall(r"\{project\}/(\S+)", table["test-command"])
    assert (ROOT / script).is_file()


def test_cibuildwheel_accepts_its_table() -> None:
    pytest.importorskip("cibuildwheel", reason="cibuildwheel is not installed; `make wheel` does")
    words = ["--platform", "linux", "--archs", "x86_64,aarch64", "--print-build-identifiers"]
    command = [sys.executable, "-m", "cibuildwheel", *words, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == set(PYPROJECT["tool"]["cibuildwheel"]["build"])


def test_the_extras_that_messages_name_exist() -> None:
    extras = set(PYPROJECT["project"]["optional-dependencies"])
    named = {
        extra
        for path in (ROOT / "groundkern").rglob("*.py")
        for extras_ in re.findall(r"groundkern\[([\w,]+)\]", path.read_text(encoding="utf-8"))
        for extra in extras_.split(",")
    }
    assert "trainer" in named
    assert named <= extras


# What may be imported as soon as a module is: what the part's extra names or what that requires.
# triton: by the modules of kernels alone (tests/test_architecture.py).
IMPORTED = {"base": {"groundkern", "torch", "triton", "typing_extensions"}}
IMPORTED["hf"] = IMPORTED["base"] | {"PIL", "accelerate", "transformers"}
IMPORTED["hf"] |= {"jinja2", "numpy", "packaging", "safetensors"}
IMPORTED["trainer"] = IMPORTED["hf"] | {*NEEDED, "contourpy", "markupsafe", "tokenizers"}
PROGRAMS = {"axolotl", "lightning", "llamafactory", "pytorch_lightning", "swift"}
IMPORTED["integrations"] = IMPORTED["trainer"] | PROGRAMS  # each imports the program it is for


@pytest.mark.parametrize("part", IMPORTED)
def test_what_is_imported_at_once_is_what_the_extra_installs(part: str) -> None:
    found = {}
    for path in (ROOT / "groundkern").rglob("*.py"):
        top = path.relative_to(ROOT / "groundkern").parts[0]
        if part == (top if top in IMPORTED else "base"):
            found |= dict.fromkeys(imported_at_once(path), path.name)
    assert "torch" in found
    outside = set(found) - IMPORTED[part] - set(sys.stdlib_module_names)
    assert {name: found[name] for name in outside} == {}


def imported_at_once(path: Path) -> Iterator[str]:
    """The top-level names of a module's own imports, without those inside functions."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (name.name.partition(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]


def test_a_command_without_its_extra_says_so_in_one_sentence() -> None:
    """What the extra [trainer] brings is what `groundkern` says is missing, one by one."""
    table = PYPROJECT["project"]["optional-dependencies"]
    wanted = {re.split(r"[\[<>=;]", need)[0] for need in table["trainer"] + table["hf"]}
    modules = {"pillow": "PIL", "pydantic-settings": "pydantic_settings", "pyyaml": "yaml"}
    assert {modules.get(name, name) for name in wanted} == {*NEEDED, "groundkern"}

    for name in ("pydantic", "pydantic_settings"):
        lines = f"import sys\nsys.modules[{name!r}] = None\nsys.argv[1:] = ['--help']\n"
        blocked = lines + "from groundkern import __main__ as m\nm.find_spec = lambda name: None\n"
        done = run(["-c", f"{blocked}sys.exit(m.main())"], ROOT)
        assert done.returncode == 2, done.stderr
        assert done.stderr.splitlines() == [
            f"error: {name} is not installed; groundkern's commands but `env` need "
            "`pip install 'groundkern[trainer]'`"
        ]
