"""`groundkern env`: it says what a bug report needs, whatever is missing, and nothing private."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

import groundkern
from groundkern import environment

ROOT = Path(__file__).resolve().parents[1]
PRIVATE = {"HF_TOKEN": "hf_secret", "GROUNDKERN_API_KEY": "gk_secret", "MASTER_ADDR": "node17"}


def printed(*words: str, **variables: str) -> str:
    command = [sys.executable, *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_report_says_what_runs_and_nothing_private(tmp_path: Path) -> None:
    home = tmp_path / "alice"
    told = {"OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": "/scratch/alice/kernels"}
    out = printed(
        *("-m", "groundkern", "env", "--json"), HOME=str(home), LOGNAME="alice", **told, **PRIVATE
    )
    found = json.loads(out)
    assert found["groundkern"]["version"] == groundkern.__version__
    assert found["packages"]["torch"] == metadata.version("torch")
    reasons = groundkern.available_backends()
    said = {name: environment.public(why or "runs here") for name, why in reasons.items()}
    assert found["backends"] == said
    if reasons["native"] is None:
        assert found["native"]["used"] in found["native"]["instruction sets"].split(", ")
    assert found["torch"]["threads"] == 1
    assert found["variables"]["OMP_NUM_THREADS"] == "1"
    assert found["variables"]["TRITON_CACHE_DIR"] == ".../kernels"
    assert not set(PRIVATE) & set(found["variables"])
    for word in ("alice", str(ROOT), platform.node(), *PRIVATE.values()):
        assert word not in out


def test_it_runs_without_torch() -> None:
    out = printed(
        "-c",
        "import sys\nsys.modules['torch'] = None\nimport groundkern.environment as e\n"
        "sys.exit(e.main([]))",
    )
    assert "backends:\n  none: torch is not installed\n" in out
    assert "\nnative: none\ntorch: none\n" in out


def test_a_section_that_fails_says_so_and_the_others_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> int:
        raise OSError("/usr/lib/libcuda.so: no")

    monkeypatch.setattr(torch, "get_num_threads", broken)
    found = environment.report()
    assert found["torch"] == {"error": "OSError: .../libcuda.so: no"}
    assert "error" not in found["devices"]
    lines = environment.text(found).splitlines()
    assert "  error: OSError: .../libcuda.so: no" in lines
    assert f"  version: {groundkern.__version__}" in lines


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("/srv/bob/env/lib/x.so: undefined symbol", "~/env/lib/x.so: undefined symbol"),
        ("/srv/bobby/x.so", ".../x.so"),
        ("/srv/bob", "~"),
        ("no compiler (/usr/bob/g++)", "no compiler (.../g++)"),
        ("on bobs-laptop as bob", "on <host> as <user>"),
        ("node bobs-laptop.lab.net", "node <host>"),
        (r"no C:\Users\Bob Smith\env\x.dll", r"no .../x.dll"),
        ("cache_bob, bobsled", "cache_<user>, bobsled"),
        ("12/24 cores, a/b", "12/24 cores, a/b"),
        ("torch/lib/libgomp.so.1, ~/x", "torch/lib/libgomp.so.1, ~/x"),
    ],
)
def test_what_is_private_is_left_out(
    words: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/srv/bob")
    monkeypatch.setenv("LOGNAME", "bob")
    monkeypatch.setattr(platform, "node", lambda: "bobs-laptop.lab.net")
    assert environment.public(words) == wanted


@pytest.mark.parametrize(
    ("origin", "folder", "wanted"),
    [
        (None, "groundkern", "wheel cp310-abi3-linux_x86_64 from an index, by pip"),
        ({"url": "file:///x.whl"}, "groundkern", "from a file or folder, by pip"),
        (None, "elsewhere/groundkern", "but another folder of sources runs"),
        ("editable", "checkout/groundkern", "editable, by pip"),
        ("editable", "elsewhere/groundkern", "but another folder of sources runs"),
    ],
)
def test_how_it_was_installed(
    origin: object, folder: str, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "groundkern-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: groundkern\nVersion: 0.1.0\n")
    (info / "WHEEL").write_text("Wheel-Version: 1.0\nTag: cp310-abi3-linux_x86_64\n")
    (info / "INSTALLER").write_text("pip\n")
    if origin == "editable":
        url = (tmp_path / "checkout").as_uri()
        origin = {"url": url, "dir_info": {"editable": True}}
    if origin is not None:
        (info / "direct_url.json").write_text(json.dumps(origin))
    monkeypatch.setattr(metadata, "distribution", lambda name: metadata.PathDistribution(info))
    assert environment._installed(tmp_path / folder).endswith(wanted)


def test_a_folder_of_sources_is_not_an_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    assert environment._installed(ROOT / "groundkern").startswith("no, ")
