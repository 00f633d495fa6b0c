"""Builds groundkern._C from csrc/; everything else is in pyproject.toml.

The extension is written against Python's limited API, so one wheel per kind of processor serves
Python 3.10 and later. (Free-threaded Pythons have none: there it is built for that Python alone.)

Without a C++17 compiler the install still succeeds: groundkern/_C.py takes the extension's place
and raises an ImportError with the reason, which `groundkern.available_backends()` reports. With a
compiler, an error in our own sources fails the build. GROUNDKERN_WERROR=1, set in CI, makes
warnings errors; GROUNDKERN_SANITIZE=1 builds with AddressSanitizer and UndefinedBehaviorSanitizer
(`make sanitize`).
"""

import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
FILES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.*"))
SOURCES = [file for file in FILES if file.endswith(".cpp")]

# Without Python's own flags: the kernels' code must not depend on how Python was built.
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-MMD"]
# Contraction to fused multiply-add, and if-conversion of loops that cannot trap.
FLAGS += ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-isystem", sysconfig.get_paths()["include"]]
LIMITED = not sysconfig.get_config_var("Py_GIL_DISABLED")
if LIMITED:
    FLAGS.append("-DPy_LIMITED_API=0x030A0000")  # 3.10
EXPORTS = ["-Wl,--version-script=csrc/exports.map"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g1"]

STAND_IN = '''\
"""Stands where the C++ extension would be; written by setup.py."""

raise ImportError({reason!r})
'''


def compiler() -> list[str]:
    """The C++ compiler's command: $CXX, else the first of the usual names on PATH; with -fopenmp,
    or with -fopenmp-simd (one thread) if it has no OpenMP.

    Raises:
        OSError: there is none, or it cannot build a C++17 program against Python's headers.
    """
    if not sys.platform.startswith("linux"):
        raise OSError(f"the C++ kernels are built on Linux only, and this is {sys.platform}")
    named = shlex.split(os.environ.get("CXX", ""))
    candidates = [named] if named else [["g++"], ["c++"], ["clang++"]]
    command = next((words for words in candidates if shutil.which(words[0])), None)
    if command is None:
        raise OSError(f"no C++ compiler was found ({candidates[0][0]})")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <Python.h>\n#include <optional>\nstd::optional<int> x;\n")
        for openmp in ("-fopenmp", "-fopenmp-simd"):
            probe = [*command, openmp, *FLAGS, "-shared", str(source)]
            probe += ["-o", str(Path(folder, "probe.so"))]
            result = subprocess.run(probe, capture_output=True, text=True)
            if result.returncode == 0:
                return [*command, openmp]
    lines = result.stderr.strip().splitlines() or ["no message"]
    raise OSError(f"{command[0]} cannot build a C++17 extension ({lines[0]})")


def stale(built: str, source: str) -> bool:
    """Whether an object file is older than its source or a header, which -MMD lists beside it."""
    try:
        rule = Path(built).with_suffix(".d").read_text().replace("\\\n", "")
        inputs = [source, *rule.partition(":")[2].split()]
        return any(os.stat(path).st_mtime > os.stat(built).st_mtime for path in inputs)
    except OSError:
        return True


def execute(command: list[str]) -> None:
    """Run a compiler; its messages are shown.

    Raises:
        CompileError: it failed.
    """
    logging.info(shlex.join(command))
    if subprocess.run(command).returncode != 0:
        raise CompileError(f"{command[0]} failed (its messages are above)")


def remove_others(target: Path) -> None:
    """Remove what earlier builds left beside an extension that is built, or beside its stand-in:
    Python would import that first."""
    for path in target.parent.glob("_C.*"):
        if path.suffix in (".so", ".py") and path.name != target.name:
            path.unlink()


class Build(build_ext):
    missing = ""  # why there is no extension

    def get_ext_filename(self, name: str) -> str:
        """The extension's path in the package, or the path of its stand-in."""
        built = super().get_ext_filename(name)
        return str(Path(built).with_name("_C.py")) if self.missing else built

    def run(self) -> None:
        try:
            self.command = compiler()
        except OSError as error:
            self.missing = f"not built: {error}"
            print(f"groundkern: installing without its C++ kernels: {error}", file=sys.stderr)
        else:
            if not LIMITED:
                print(
                    "groundkern: this Python is free-threaded, which has no limited API: the C++ "
                    "kernels are built for it alone",
                    file=sys.stderr,
                )
        super().run()

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_others(target)
        if self.missing:
            target.write_text(STAND_IN.format(reason=self.missing))
            return
        compile_, link = [*self.command, *FLAGS, "-c"], [*self.command, "-shared"]
        if os.environ.get("GROUNDKERN_WERROR") == "1":
            compile_.append("-Werror")
        if os.environ.get("GROUNDKERN_SANITIZE") == "1":
            compile_ += SANITIZE
            link += SANITIZE
        # A folder for each set of flags: objects that were built with others are not reused.
        digest = hashlib.sha256(shlex.join(compile_).encode()).hexdigest()[:12]
        folder = Path(self.build_temp, digest)
        objects = [str(folder / source) + ".o" for source in extension.sources]
        commands = []
        for source, built in zip(extension.sources, objects):
            if stale(built, source):
                Path(built).parent.mkdir(parents=True, exist_ok=True)
                commands.append([*compile_, source, "-o", built])
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(execute, commands))
        execute([*link, *EXPORTS, *objects, "-o", str(target)])

    def copy_extensions_to_source(self) -> None:
        for extension in self.extensions:
            remove_others(ROOT / self.get_ext_filename(extension.name))
        super().copy_extensions_to_source()


EXTENSION = Extension("groundkern._C", SOURCES, depends=FILES, py_limited_api=LIMITED)
# A wheel with the stand-in has the same tag: it says why there are no kernels on such a machine.
setup(
    ext_modules=[EXTENSION],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if LIMITED else {},
)
