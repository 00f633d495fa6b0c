"""What surrounds the code says the same as the code: versions, commands of workflows, links."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import yaml

import groundkern

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def _text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_one_version() -> None:
    said = re.search(r'(?m)^version = "(.*)"', _text("pyproject.toml"))
    cited = yaml.safe_load(_text("CITATION.cff"))
    assert {said and said[1], str(cited["version"])} == {groundkern.__version__}
    newest = re.search(r"(?m)^## (\S+)", _text("CHANGELOG.md"))
    assert newest[1] == groundkern.__version__


def test_workflows_run_targets_that_exist() -> None:
    targets = set(re.findall(r"(?m)^([\w-]+):", _text("Makefile")))
    used = set()
    for path in WORKFLOWS:
        for job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values():
            assert "timeout-minutes" in job or path.stem in ("docs", "wheels"), path.name
            for step in job["steps"]:
                words = shlex.split(step.get("run", ""), comments=True)
                if words[:1] == ["make"]:
                    used |= {word for word in words[1:] if "=" not in word}
    assert {"lint", "test", "types", "docs", "gpu"} <= used
    assert used <= targets


def test_workflows_run_the_pythons_that_are_promised() -> None:
    promised = re.findall(r"Python :: (3\.\d+)", _text("pyproject.toml"))
    tests = yaml.safe_load(_text(".github/workflows/tests.yml"))
    assert tests["jobs"]["tests"]["strategy"]["matrix"]["python"] == promised


def test_the_hooks_are_of_the_pinned_ruff() -> None:
    hooks = yaml.safe_load(_text(".pre-commit-config.yaml"))["repos"][0]["hooks"]
    pinned = re.search(r"(?m)^ruff==\S+", _text("constraints.txt"))[0]
    asked = {one for hook in hooks for one in hook.get("additional_dependencies", [])}
    assert asked == {pinned}
