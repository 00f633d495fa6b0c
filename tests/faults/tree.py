"""The folder of a run as a whole: copied, put aside, compared."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path

ASIDE = ".aside"
# Times, which differ from run to run and decide nothing.
_TIMES = re.compile(rb'("(?:samples_per_second|tokens_per_second|seconds)": )[-+.e\d]+')
_TIMED = ("metrics.jsonl", "groundkern.json")
_PAGE = "report.html"
_LOCK = "run.lock"  # says who held it, and since when


def aside(root: Path) -> None:
    """Move a folder out of the way, with all that is open in it."""
    root.rename(_aside(root))


def stand_in(root: Path) -> None:
    """Put a copy of what was moved away in its place."""
    shutil.copytree(_aside(root), root, symlinks=True)


def put_back(root: Path) -> None:
    """Move the folder back; what stands in its place is removed."""
    shutil.rmtree(root, ignore_errors=True)
    _aside(root).rename(root)


def replace(root: Path, source: Path) -> None:
    """Make a folder a copy of another one."""
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(source, root, symlinks=True)


def _aside(root: Path) -> Path:
    return root.with_name(root.name + ASIDE)


def names(folder: Path) -> list[str]:
    """All paths below a folder, relative to it, sorted; a folder ends with a slash."""
    return sorted(str(path.relative_to(folder)) + "/" * path.is_dir() for path in folder.rglob("*"))


def digest(folder: Path) -> str:
    """A hash (of this process: bytes keep theirs) of names and contents.

    Of times it only counts that they are there, of the page its end.
    """
    files = {
        name: None if name[-1] == "/" else (folder / name).read_bytes() for name in names(folder)
    }
    return digest_of({name.rstrip("/"): content for name, content in files.items()})


def digest_of(files: dict[str, bytes | None]) -> str:
    """`digest` of a folder that is not on the disk: contents by path, None for a folder."""
    found = []
    for name, content in sorted(files.items()):
        if content is not None:
            if name.endswith(_TIMED):
                content = _TIMES.sub(rb"\1", content)
            if name.endswith((_PAGE, _LOCK)):
                content = content[-10:] if name.endswith(_PAGE) else b""
        found.append((name, content if content is None else hash(content)))
    return hash_of(repr(found).encode())


def hash_of(content: bytes) -> str:
    """A hash of bytes."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def holds_whole(page: Path) -> bool:
    """Whether an HTML page is there to its end."""
    return page.read_text(encoding="utf-8", errors="replace").rstrip().endswith("</html>")
