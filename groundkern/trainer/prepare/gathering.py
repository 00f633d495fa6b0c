"""The whole of a prepare command from its shards: `--gather 64`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from groundkern.trainer.config import ConfigError
from groundkern.trainer.differences import differences
from groundkern.trainer.prepare.output import Output, recorded
from groundkern.trainer.prepare.shards import Shard
from groundkern.trainer.prepare.sources import Source, counted

NAMED = 20  # shards that a message names


def gather(
    source: Source,
    *,
    output: Path,
    settings: Mapping[str, Any],
    shards: int,
    overwrite: bool = False,
) -> Output:
    """Puts the outputs of all shards one behind the other; they are left as they are.

    Args:
        source: the inputs, of which none is worked on.
        output: the JSON-lines file that one process would have made.
        settings: as `groundkern.trainer.prepare.pipeline.prepare` got them for each shard.
        shards: how many there are.
        overwrite: start again, whatever is there.

    Returns:
        The finished output.

    Raises:
        ConfigError: shards that are not done, or of other settings or inputs.
    """
    settings = {**settings, "input": source.identity}
    total = counted(source)
    parts = {each: each.part(total) for each in (Shard(i + 1, shards) for i in range(shards))}
    if overwrite or not _finished(output):
        _all_done(output, settings, parts)  # before anything is written
    with Output(output, settings, overwrite=overwrite) as out:
        if out.finished:
            return out
        out.passed_over = source.passed_over
        for shard, part in parts.items():
            if out.inputs == part.start:
                out.append(shard.output(output))
        if out.inputs != total:
            begun = f"{output}: begun without shards, {out.inputs:,} inputs are done"
            raise ConfigError(f"{begun}; go on without --gather, or --overwrite")
        out.finish()
    return out


def _finished(output: Path) -> bool:
    """Whether nothing is left to do; of a damaged record `Output` tells."""
    try:
        state = recorded(output)
    except (OSError, ValueError):
        return False
    return state is not None and state["finished"]


def _all_done(output: Path, settings: Mapping[str, Any], parts: Mapping[Shard, range]) -> None:
    """Raises `ConfigError` unless each shard is finished, with its part and these settings."""
    missing = []
    for shard, part in parts.items():
        path = shard.output(output)
        try:
            state = recorded(path)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: its record is damaged ({error})") from None
        if state is None or not state["finished"] or not path.exists():
            missing.append(shard)
            continue
        if path.stat().st_size != state["bytes"][0]:
            wanted = f"{state['bytes'][0]:,} bytes, as its record says"
            raise ConfigError(f"{path}: expected {wanted}, got {path.stat().st_size:,}")
        changed = differences(state["settings"], {**settings, "shard": str(shard)})
        if changed:
            raise ConfigError(f"{path}: made with other settings or inputs ({'; '.join(changed)})")
        if state["inputs"] != len(part):
            raise ConfigError(f"{path}: expected {len(part)} inputs, got {state['inputs']}")
    if missing:
        told = ", ".join(map(str, missing[:NAMED])) + ", ..." * (len(missing) > NAMED)
        done = len(parts) - len(missing)
        raise ConfigError(
            f"--gather: expected {len(parts)} shards that are done, got {done}; missing: {told}"
        )
