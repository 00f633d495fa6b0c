"""`python -m benchmarks.carry`: what a GPU machine without network or git needs for `make gpu`.

The folder `carry` gets the peers' wheels and the name of the commit; `make gpu` finds both there.

Fetches Liger-Kernel and cut-cross-entropy with this Python's pip, as it is configured, and those of
their dependencies that such a machine lacks. Only pure Python is carried, because the machine may
have another Python and another C library. A package without a wheel is built from source here.
Prints names, versions, sizes and how to install them there; exits with 1 if something cannot be
carried.

QuACK is left out: it needs nvidia-cutlass-dsl, whose compiled libraries alone (92 MB in 4.8.1) are
more than may be carried.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.timing.commit import NOTE, ROOT, described

PEERS = ("liger-kernel", "cut-cross-entropy")
THERE = {"torch", "triton", "transformers", "numpy", "packaging", "pytest", "typing-extensions"}
LIMIT = 64 * 2**20  # bytes
INSTALL = "python -m pip install --no-index --no-deps --no-compile --target SITE {}/*.whl"
DEFAULT = ROOT / "carry"


class Refused(Exception):
    """Why a package cannot be carried, in one sentence."""


class Wheel(NamedTuple):
    path: Path
    name: str
    version: str
    needs: list[str]  # packages it requires without extras

    @property
    def size(self) -> int:
        return self.path.stat().st_size


def read(path: Path) -> Wheel:
    """Name, version and dependencies, as the wheel's metadata says."""
    with zipfile.ZipFile(path) as archive:
        name = next(x for x in archive.namelist() if x.endswith(".dist-info/METADATA"))
        fields = HeaderParser().parsestr(archive.read(name).decode())
    needs = [Requirement(x) for x in fields.get_all("Requires-Dist", [])]
    used = [x for x in needs if x.marker is None or x.marker.evaluate({"extra": ""})]
    names = [canonicalize_name(x.name) for x in used]
    return Wheel(path, canonicalize_name(fields["Name"]), fields["Version"], names)


def fetched(package: str, folder: Path) -> Wheel:
    """The package's wheel, which is put into `folder`."""
    with tempfile.TemporaryDirectory() as own:
        command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", own, package]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            lines = [x for x in result.stderr.splitlines() if x.startswith("ERROR")]
            raise Refused(f"{package}: pip has no wheel ({lines[-1] if lines else 'no reason'})")
        (path,) = Path(own).glob("*.whl")
        if not path.stem.endswith("-none-any"):
            raise Refused(f"{package}: {path.name} is not pure Python")
        carried = folder / path.name
        carried.write_bytes(path.read_bytes())
    return read(carried)


def carry(folder: Path) -> tuple[list[Wheel], list[str]]:
    """Fetches everything into `folder`; returns (wheels, what cannot be carried and why)."""
    folder.mkdir(parents=True, exist_ok=True)
    if found := sorted(folder.glob("*.whl")):
        raise Refused(f"{folder} already has wheels: {', '.join(x.name for x in found)}")
    wheels: dict[str, Wheel] = {}
    refused: list[str] = []
    asked, waiting = set(PEERS), list(PEERS)
    while waiting:
        package = waiting.pop(0)
        try:
            wheel = fetched(package, folder)
        except Refused as reason:
            refused.append(str(reason))
            continue
        wheels[package] = wheel
        new = [x for x in wheel.needs if x not in THERE | asked]
        asked.update(new)
        waiting += new
    if (size := sum(wheel.size for wheel in wheels.values())) > LIMIT:
        refused.append(f"{size} bytes are more than the {LIMIT} that may be carried")
    return list(wheels.values()), refused


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 if something cannot be carried."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.carry", description=__doc__)
    where = {"type": Path, "default": DEFAULT, "metavar": "DIR"}
    parser.add_argument("--to", **where, help="a folder without wheels yet; default: carry")
    folder = parser.parse_args(arguments).to
    try:
        wheels, refused = carry(folder)
    except Refused as reason:
        parser.error(str(reason))
    for wheel in wheels:
        print(f"{wheel.name} {wheel.version}: {wheel.size} bytes, {wheel.path.name}")
    for reason in refused:
        print(f"not carried: {reason}", file=sys.stderr)
    commit = described()
    (folder / NOTE.name).write_text(commit + "\n", encoding="utf-8")
    print(f"commit {commit}")
    if wheels:
        print(f"make gpu installs them by itself. By hand: {INSTALL.format(folder)}")
    return int(bool(refused))


if __name__ == "__main__":
    sys.exit(main())
