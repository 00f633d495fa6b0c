"""Wheels for a machine without a network, fetched from a local folder of invented ones."""

import shlex
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from benchmarks import carry
from benchmarks.timing.commit import described


def wheel(folder: Path, name: str, *needs: str, tag: str = "py3-none-any", filler: int = 0) -> None:
    """A wheel with one module that says its own name."""
    module = name.replace("-", "_")
    info = f"{module}-1.5.dist-info"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.5"]
    lines += [f"Requires-Dist: {x}" for x in needs]
    with zipfile.ZipFile(folder / f"{module}-1.5-{tag}.whl", "w") as archive:
        archive.writestr(f"{module}.py", f"NAME = {name!r}\n" + "#" * filler)
        archive.writestr(f"{info}/METADATA", "\n".join(lines) + "\n")
        pure = "true" if tag.endswith("any") else "false"
        text = f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: {pure}\nTag: {tag}\n"
        archive.writestr(f"{info}/WHEEL", text)
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the only packages that pip can find."""
    folder = tmp_path / "registry"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


def test_peers_and_their_needs_are_carried_and_installed(registry, tmp_path, capsys) -> None:
    wheel(registry, "liger-kernel", "torch>=2", "small", 'plots; extra == "dev"')
    wheel(registry, "cut-cross-entropy", "torch", 'triton; platform_system == "Linux"')
    wheel(registry, "small", "smaller>1")
    wheel(registry, "smaller", "small")
    to = tmp_path / "to"
    assert carry.main(["--to", str(to)]) == 0
    said = capsys.readouterr().out
    size = (to / "small-1.5-py3-none-any.whl").stat().st_size
    assert f"small 1.5: {size} bytes" in said
    assert sorted(x.name.split("-")[0] for x in to.iterdir()) == [
        "commit",
        "cut_cross_entropy",
        "liger_kernel",
        "small",
        "smaller",
    ]
    noted = (to / "commit").read_text(encoding="utf-8").strip()
    assert noted == described() and f"commit {noted}\n" in said
    command = said.split("By hand: ")[1].strip()
    command_line = shlex.split(command.replace("SITE", str(tmp_path / "site")))
    files = [str(x) for x in sorted(to.glob("*.whl"))]
    assert command_line[0] == "python" and command_line[-1] == f"{to}/*.whl"
    subprocess.run([sys.executable, *command_line[1:-1], *files], check=True, capture_output=True)
    program = "import liger_kernel, smaller; print(liger_kernel.NAME, smaller.NAME)"
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split() == ["liger-kernel", "smaller"]


def test_what_cannot_be_carried_is_said(registry, tmp_path, capsys) -> None:
    tag = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
    wheel(registry, "liger-kernel", tag=tag)
    to = tmp_path / "to"
    assert carry.main(["--to", str(to)]) == 1
    said = capsys.readouterr().err
    assert f"liger-kernel: liger_kernel-1.5-{tag}.whl is not pure Python" in said
    assert "cut-cross-entropy: pip has no wheel (ERROR: No matching distribution" in said
    assert not list(to.glob("*.whl"))


def test_a_limit_and_a_folder_in_use(registry, tmp_path, capsys, monkeypatch) -> None:
    for name in carry.PEERS:
        wheel(registry, name, filler=1000)
    monkeypatch.setattr(carry, "LIMIT", 2000)
    assert carry.main(["--to", str(tmp_path / "to")]) == 1
    assert "more than the 2000" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        carry.main(["--to", str(tmp_path / "to")])
    assert "already has wheels" in capsys.readouterr().err
