"""Which commit is measured, also where there is no git: on a lent machine the tree comes alone."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
NOTE = ROOT / "carry" / "commit"  # `python -m benchmarks.carry` writes it


def described() -> str:
    """The commit of the tree by git, with "-dirty" where files differ from it; "" without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def commit() -> str:
    """By git, else by the note that came along; "unknown" without either."""
    note = NOTE.read_text(encoding="utf-8").strip() if NOTE.exists() else ""
    return described() or note or "unknown"
