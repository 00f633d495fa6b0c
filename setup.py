"""Builds groundkern._C from csrc/ with ninja and pybind11; all else is in pyproject.toml.

Without a C++17 compiler the install still succeeds: groundkern/_C.py takes the extension's place
and raises an ImportError with the reason, which `groundkern.available_backends()` reports. Where
there is a compiler, an error in our own sources fails the build. GROUNDKERN_WERROR=1, set in CI,
makes warnings errors; GROUNDKERN_SANITIZE=1 builds with AddressSanitizer and
UndefinedBehaviorSanitizer (`make sanitize`).
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CPU = ("attention_map", "isa", "linear_cross_entropy", "linear_cross_entropy_backward")
CPU += ("side_attention",)
SOURCES = ["csrc/bindings.cpp", *(f"csrc/cpu/{name}.cpp" for name in CPU)]
HEADERS = ["csrc/arguments.h", "csrc/ops.h", "csrc/views.h", "csrc/rows.h"]
INNER = ("attention_map.h", "gathered.h", "head.h", "isa.h", "panels.h")
INNER += ("isa.inc", "products.inc", "vocabulary.inc")
HEADERS += [f"csrc/cpu/{name}" for name in INNER]

COMPILE = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# Contraction to fused multiply-add, and if-conversion of loops that cannot trap.
COMPILE += ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]

SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g1"]

NINJA = """\
rule compile
  command = {compiler} {flags} -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {compiler} -shared $in {link} -o $out
{objects}
build {target}: link {names}
"""

STAND_IN = '''\
"""Stands where the C++ extension would be; written by setup.py."""

raise ImportError({reason!r})
'''


def compiler() -> list[str]:
    """The C++ compiler's command: $CXX, else the first of the usual names on PATH.

    Raises:
        FileNotFoundError: there is none.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["g++"], ["c++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise FileNotFoundError(f"no C++ compiler was found ({named[0] if named else 'g++'})")


def openmp_flags(command: list[str]) -> list[str]:
    """-fopenmp where the compiler has it, else -fopenmp-simd (one thread).

    Raises:
        OSError: the compiler cannot build a C++17 program against Python's headers at all.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <Python.h>\n#include <optional>\nstd::optional<int> x;\n")
        for flags in (["-fopenmp"], ["-fopenmp-simd"]):
            probe = [*command, *COMPILE, *flags, *includes(), "-shared", str(source)]
            probe += ["-o", str(Path(folder, "probe.so"))]
            result = subprocess.run(probe, capture_output=True, text=True)
            if result.returncode == 0:
                return flags
    lines = result.stderr.strip().splitlines() or ["no message"]
    raise OSError(f"{command[0]} cannot build a C++17 extension ({lines[0]})")


def includes() -> list[str]:
    import pybind11

    folders = (sysconfig.get_paths()["include"], pybind11.get_include())
    return [argument for folder in folders for argument in ("-isystem", folder)]


def escaped(path: Path | str) -> str:
    """A path as ninja reads it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class Build(build_ext):
    def targets(self, folder: Path | str, extension: Extension) -> tuple[Path, Path]:
        """Where under `folder` the extension goes, and its stand-in."""
        target = Path(folder, self.get_ext_filename(extension.name)).resolve()
        return target, target.parent / "_C.py"

    def build_extension(self, extension: Extension) -> None:
        target, stand_in = self.targets(self.build_lib, extension)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            if not sys.platform.startswith("linux"):
                raise OSError(
                    f"the C++ kernels are built on Linux only, and this is {sys.platform}"
                )
            command = compiler()
            openmp = openmp_flags(command)
        except OSError as error:
            target.unlink(missing_ok=True)
            stand_in.write_text(STAND_IN.format(reason=f"not built: {error}"))
            print(f"groundkern: installing without its C++ kernels: {error}", file=sys.stderr)
            return
        stand_in.unlink(missing_ok=True)
        self.run_ninja(command, openmp, extension.sources, target)

    def run_ninja(
        self, command: list[str], openmp: list[str], sources: list[str], target: Path
    ) -> None:
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        sanitize = SANITIZE if os.environ.get("GROUNDKERN_SANITIZE") == "1" else []
        flags = [*COMPILE, *openmp, *sanitize, *includes()]
        if os.environ.get("GROUNDKERN_WERROR") == "1":
            flags.append("-Werror")
        names = [escaped(source.replace("/", "_") + ".o") for source in sources]
        objects = [
            f"build {name}: compile {escaped(ROOT / source)}"
            for name, source in zip(names, sources)
        ]
        text = NINJA.format(
            compiler=shlex.join(command),
            flags=shlex.join(flags).replace("$", "$$"),
            link=shlex.join([*openmp, *sanitize]),
            objects="\n".join(objects),
            names=" ".join(names),
            target=escaped(target),
        )
        (folder / "build.ninja").write_text(text)
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder)], check=True)

    def copy_extensions_to_source(self) -> None:
        """Bring the extension, or its stand-in, from the build folder into the source tree."""
        for extension in self.extensions:
            built = self.targets(self.build_lib, extension)
            for source, target in zip(built, self.targets(ROOT, extension)):
                target.unlink(missing_ok=True)
                if source.exists():
                    shutil.copy2(source, target)

    def get_outputs(self) -> list[str]:
        """What was built, for the list of installed files."""
        paths = [path for e in self.extensions for path in self.targets(self.build_lib, e)]
        return [str(path) for path in paths if path.exists()]


setup(
    ext_modules=[Extension("groundkern._C", sources=SOURCES, depends=HEADERS)],
    cmdclass={"build_ext": Build},
)
