"""`groundkern env`: what a bug report needs to know of a machine, and nothing of its owner.

It runs without torch, and without any extra. Versions are read from what is installed; only torch
and groundkern's own backends are imported. Paths are shortened, and no host or user is named.
"""

from __future__ import annotations

import argparse
import getpass
import importlib
import json
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import groundkern

HELP = "what a bug report needs: versions, backends, CPU, devices"

_CORE = ("torch", "triton", "transformers", "accelerate", "peft")  # said if missing, too
_OTHERS = (
    "axolotl", "av", "bitsandbytes", "datasets", "deepspeed", "flash-attn", "kernels",
    "liger-kernel", "lightning", "llamafactory", "ms-swift", "numpy", "onnxruntime", "pillow",
    "pydantic", "rapidocr", "safetensors", "tokenizers", "torchvision", "trl",
)  # fmt: skip
_CPU_FLAGS = (
    "avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_fp16", "amx_bf16",
    "asimd", "sve", "sve2", "bf16", "i8mm",
)  # fmt: skip
# Of the variables that change what our code or torch's does; none holds a secret or an address.
_VARIABLES = (
    "CC", "CUDA_LAUNCH_BLOCKING", "CUDA_VISIBLE_DEVICES", "CXX", "HF_HUB_OFFLINE",
    "HIP_VISIBLE_DEVICES", "HSA_OVERRIDE_GFX_VERSION", "LD_PRELOAD", "OPENBLAS_NUM_THREADS",
    "PYTHONHASHSEED", "ROCR_VISIBLE_DEVICES", "TOKENIZERS_PARALLELISM", "TRANSFORMERS_OFFLINE",
    "TRANSFORMERS_VERBOSITY", "WORLD_SIZE",
)  # fmt: skip
_PREFIXES = (
    "GROUNDKERN_", "GOMP_", "KMP_", "MKL_", "OMP_", "PYTORCH_", "TORCHDYNAMO_", "TORCHINDUCTOR_",
    "TRITON_",
)  # fmt: skip
_SECRET = re.compile("KEY|PASS|SECRET|TOKEN(?!IZERS)|URL|PROXY")
_PATH = re.compile(  # up to its last part; of Windows too
    r"(?<![\w.~/])/(?:[^/\s:,'\"()]+/)*(?=[^/\s])|\b[A-Za-z]:\\(?:[^\\\n:,'\"()]+\\)*(?=[^\\\s])"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")


def run(arguments: argparse.Namespace) -> int:
    """Print the report; returns the exit status."""
    found = report()
    print(json.dumps(found, indent=2) if arguments.json else text(found))
    return 0


def main(words: list[str] | None = None) -> int:
    """`python -m groundkern.environment`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="groundkern env", description=HELP, allow_abbrev=False)
    add_arguments(parser)
    return run(parser.parse_args(words))


def report() -> dict[str, Any]:
    """What is known of this machine, by section; JSON can hold all of it.

    Returns:
        groundkern, system, cpu, variables, packages, backends, native, torch and devices. A section
        that could not be found out holds one sentence, "error".
    """
    sections = {
        "groundkern": _groundkern,
        "system": _system,
        "cpu": _cpu,
        "variables": _variables,  # before torch, which sets some
        "packages": _packages,
        "backends": _backends,
        "native": _native,
        "torch": _torch,
        "devices": _devices,
    }
    return {name: _section(find) for name, find in sections.items()}


def text(found: dict[str, Any]) -> str:
    """The report as lines to paste."""
    lines = []
    for name, section in found.items():
        lines.append(f"{name}:" if section else f"{name}: none")
        lines += [f"  {key}: {'yes' if value is True else value}" for key, value in section.items()]
    return "\n".join(lines)


def public(words: str) -> str:
    """The words without what is private: the home folder is ~, other paths keep their last part,
    and what this host and its user are called is left out."""
    home = os.path.expanduser("~")
    if len(home) > 1:
        words = re.sub(rf"{re.escape(home)}(?=[/\s:,'\")]|$)", "~", words)
    words = _PATH.sub(".../", words)
    host = platform.node()
    for name, stands in ((host, "<host>"), (host.partition(".")[0], "<host>"), (_user(), "<user>")):
        if len(name) > 2 and name not in ("localhost", "root"):
            words = re.sub(rf"(?<![^\W_]){re.escape(name)}(?![^\W_])", stands, words)
    return words


def _user() -> str:
    try:
        return getpass.getuser()
    except (ImportError, KeyError, OSError):  # a container's user may have no name
        return ""


def _section(find: Any) -> dict[str, Any]:
    """A report says what it can, whatever is broken: that is what it is for."""
    try:
        found = find()
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    return {key: public(v) if isinstance(v, str) else v for key, v in found.items()}


def _groundkern() -> dict[str, Any]:
    folder = Path(groundkern.__file__).resolve().parent
    found: dict[str, Any] = {"version": groundkern.__version__, "installed": _installed(folder)}
    if (folder.parent / ".git").exists():
        found["commit"] = _git(folder, "rev-parse", "--short=12", "HEAD") or "unknown"
        found["changed files"] = len(_git(folder, "status", "--porcelain").splitlines())
    return found


def _installed(folder: Path) -> str:
    """How the package that runs came to be here."""
    try:
        distribution = metadata.distribution("groundkern")
    except metadata.PackageNotFoundError:
        return "no, it runs from a folder of sources"
    by = (distribution.read_text("INSTALLER") or "an unnamed installer").strip()
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    editable = origin.get("dir_info", {}).get("editable", False)
    if editable and Path(unquote(urlsplit(origin["url"]).path)).resolve() == folder.parent:
        return f"editable, by {by}"
    if Path(str(distribution.locate_file("groundkern"))).resolve() != folder:
        return f"version {distribution.version} by {by}, but another folder of sources runs"
    tags = re.findall(r"^Tag: (.*)$", distribution.read_text("WHEEL") or "", re.MULTILINE)
    source = "an index" if not origin else "a file or folder"
    return f"wheel {' '.join(tags)} from {source}, by {by}"


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _system() -> dict[str, Any]:
    libc = " ".join(platform.libc_ver()).strip()
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": " ".join(x for x in (platform.system(), platform.release()) if x),
        "machine": platform.machine(),
        **({"libc": libc} if libc else {}),
    }


def _cpu() -> dict[str, Any]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    values = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    flags = set((values.get("flags") or values.get("Features") or "").split())
    found: dict[str, Any] = {
        "model": values.get("model name") or platform.processor() or "unknown",
        "cores": os.cpu_count(),
    }
    if hasattr(os, "sched_getaffinity"):
        found["cores of this process"] = len(os.sched_getaffinity(0))
    if flags:
        found["flags"] = " ".join(flag for flag in _CPU_FLAGS if flag in flags)
    return found


def _packages() -> dict[str, Any]:
    found = {}
    for name in (*_CORE, *_OTHERS):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            if name in _CORE:
                found[name] = "not installed"
    return found


def _backends() -> dict[str, Any]:
    backends = _imported("groundkern.backends")
    if backends is None:
        return {"none": "torch is not installed"}
    reasons = backends.available_backends()
    return {name: "runs here" if reason is None else reason for name, reason in reasons.items()}


def _native() -> dict[str, Any]:
    """Of the C++ extension, which needs torch's OpenMP to be loaded first."""
    if _imported("torch") is None:
        return {}
    try:
        from groundkern import _C
    except ImportError:
        return {}  # `backends` says why
    return {
        "compiler": _C.compiler,
        "OpenMP": _C.openmp or "none, one thread",
        "instruction sets": ", ".join(_C.cpu_isas()),
        "used": _C.cpu_isa(),
        "sanitized": _C.sanitized,
        "OpenMP libraries in this process": _openmp_libraries(),
    }


def _openmp_libraries() -> str:
    """Two of one kind are two pools of threads, which then wait for each other's cores."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return "unknown"
    files = {Path(line.split()[-1]) for line in maps.splitlines() if "omp" in line.split()[-1]}
    named = [x for x in files if re.match(r"lib(gomp|omp|iomp5)\b", x.name)]
    return ", ".join(sorted("/".join(x.parts[-3:]) for x in named)) or "none"


def _torch() -> dict[str, Any]:
    torch = _imported("torch")
    if torch is None:
        return {}
    return {
        "threads": torch.get_num_threads(),
        "interop threads": torch.get_num_interop_threads(),
        "CUDA": torch.version.cuda or "none",
        "ROCm": getattr(torch.version, "hip", None) or "none",
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def _devices() -> dict[str, Any]:
    torch = _imported("torch")
    if torch is None or not torch.cuda.is_available():
        return {}
    found = {}
    for index in range(torch.cuda.device_count()):
        one = torch.cuda.get_device_properties(index)
        kind = one.gcnArchName if torch.version.hip else f"sm_{one.major}{one.minor}"
        found[str(index)] = f"{one.name}, {kind}, {one.total_memory / 2**30:.1f} GiB"
    return found


def _variables() -> dict[str, Any]:
    names = (x for x in os.environ if x in _VARIABLES or x.startswith(_PREFIXES))
    return {name: os.environ[name] for name in sorted(names) if not _SECRET.search(name)}


def _imported(name: str) -> Any:
    """A module, or None if torch is missing; another error is the report's to tell."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == "torch":
            return None
        raise


if __name__ == "__main__":
    sys.exit(main())
