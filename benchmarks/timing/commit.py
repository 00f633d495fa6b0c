"""Which commit is measured. On a lent machine without git, a note beside the tree says it."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
NOTE = ROOT / "carry" / "commit"  # `python -m benchmarks.carry` writes it


def described() -> str:
    """The commit according to git, with "-dirty" if files differ from it; "" without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def commit() -> str:
    """According to git, else to the note that was carried along; "unknown" without either."""
    note = NOTE.read_text(encoding="utf-8").strip() if NOTE.exists() else ""
    return described() or note or "unknown"
