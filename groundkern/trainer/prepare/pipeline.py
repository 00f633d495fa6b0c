"""Every prepare command: inputs in order, work in parallel, checked samples out, nothing lost."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import secrets
import signal
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from PIL import Image

from groundkern.trainer.data.images import MAX_PIXELS, SampleError
from groundkern.trainer.data.sample import parse_sample
from groundkern.trainer.prepare.output import Output
from groundkern.trainer.prepare.shards import Shard
from groundkern.trainer.prepare.sources import Item, Source, counted
from groundkern.trainer.progress import progress
from groundkern.trainer.stopping import Stopped
from groundkern.trainer.workers import follow_parent, one_thread

AHEAD = 8  # inputs in work or waiting to be written, for each worker: one may be slow
COMPRESS = 3  # of PNG: half the time of 6; a page of text gets 4 % larger, a drawn grid twice


class LeftOut(SampleError):
    """An input that an option leaves out: rejected like a bad one, but it never stops the run."""


@dataclass(frozen=True)
class Made:
    """What became of one input.

    Args:
        samples: canonical records; checked and written in this order.
        images: to write, by path relative to the data root: pictures (saved as the extension
            says) or encoded bytes. The path should be made from `Item.index`, so that a rerun
            writes the same files.
        counts: added up over all inputs.
    """

    samples: Sequence[Mapping[str, Any]]
    images: Mapping[str, Image.Image | bytes] = field(default_factory=dict)
    counts: Mapping[str, float] = field(default_factory=dict)


Work = Callable[[Item], Made]


def prepare(
    source: Source,
    work: Work,
    *,
    output: Path,
    settings: Mapping[str, Any],
    root: Path | None = None,
    workers: int = 1,
    on_bad_sample: Literal["skip", "stop"] = "skip",
    overwrite: bool = False,
    max_pixels: int = MAX_PIXELS,
    unit: str = "input",
    shard: Shard | None = None,
) -> Output:
    """Runs `work` over the source and writes what it makes, or continues an earlier run.

    Samples keep the order of the inputs and are checked by `parse_sample` as the trainer will. An
    input that cannot be used goes, with the reason and as it was, to `<output>.rejected.jsonl`.

    Args:
        source: the inputs.
        work: called in a worker process with an `Item` whose `original` is None; raises
            `SampleError` for one that cannot be used, `LeftOut` for one that an option leaves out.
            Picklable: a function of a module, or an instance of a class of one.
        output: the JSON-lines file to make.
        settings: plain values that decide what comes out, the command's name included.
        root: the data root, below which `Made.images` go; default: the output's folder.
        workers: processes; 1 works in this one.
        on_bad_sample: "skip" goes on, "stop" raises at the first that is not `LeftOut`.
        overwrite: start again, whatever is there.
        max_pixels: width x height that an image may have.
        unit: what the progress bar calls an input.
        shard: of the inputs, into its own file beside `output`; default: all of them.

    Returns:
        The finished output.

    Raises:
        SampleError: with "stop", the first bad input; or a worker process died.
        Stopped: Ctrl-C or SIGTERM; what is done is saved.
        ConfigError: the output belongs to other settings or inputs, or there are more shards than
            inputs.
        OSError: something cannot be written.
    """
    step = Step(work, root if root is not None else output.parent, max_pixels)
    first, stop, path = 0, source.total, output
    settings = {**settings, "input": source.identity}
    if shard is not None:
        part = shard.part(counted(source))
        first, stop, path = part.start, part.stop, shard.output(output)
        settings["shard"] = str(shard)
    with Output(path, settings, overwrite=overwrite) as out:
        if out.finished:
            return out
        out.passed_over = source.passed_over
        items = islice(source.read(), first + out.inputs, None if shard is None else stop)
        total = None if stop is None else stop - first
        try:
            bar = progress(settings["command"], total=total, unit=unit, done=out.inputs)
            with bar, closing(in_order(step, items, workers)) as results:
                for item, done in results:
                    _keep(out, item, done, on_bad_sample)
                    bar.set_postfix(rejected=out.rejected, refresh=False)
                    bar.update()
        except BaseException as error:
            out.save()
            if not isinstance(error, Stopped | KeyboardInterrupt):
                raise
            raise Stopped(getattr(error, "number", signal.SIGINT), str(out.record)) from None
        out.finish()
    return out


@dataclass(frozen=True)
class Done:
    """Lines of an input's samples, and its counts."""

    lines: list[bytes]
    counts: dict[str, float]


@dataclass(frozen=True)
class Rejected:
    """Why an input cannot be used."""

    reason: str
    left_out: bool = False


@dataclass(frozen=True)
class Step:
    """The work on one input, its images written and its samples checked."""

    work: Work
    root: Path
    max_pixels: int

    def __call__(self, item: Item) -> Done | Rejected:
        written: list[Path] = []
        try:
            made = self.work(item)
            for name, image in made.images.items():
                written.append(write_image(self.root / PurePosixPath(name), image))
            lines = []
            for sample in made.samples:
                lines.append(
                    json.dumps(sample, ensure_ascii=False).encode("utf-8", "surrogatepass")
                )
                parse_sample(
                    lines[-1], root=self.root, where=item.where, max_pixels=self.max_pixels
                )
        except (SampleError, RecursionError) as error:
            for path in written:
                path.unlink(missing_ok=True)
            deep = f"{item.where}: expected values nested less deeply"
            reason = deep if isinstance(error, RecursionError) else str(error)
            return Rejected(reason, isinstance(error, LeftOut))
        except (Stopped, KeyboardInterrupt, OSError):
            raise
        except Exception as error:
            raise RuntimeError(f"{item.where}: {type(error).__name__}: {error}") from error
        return Done([line + b"\n" for line in lines], dict(made.counts))


def _keep(out: Output, item: Item, done: Done | Rejected, on_bad_sample: str) -> None:
    """Writes what became of an input, or raises it."""
    if isinstance(done, Done):
        out.write(done.lines, done.counts)
    elif on_bad_sample == "stop" and not done.left_out:
        raise SampleError(done.reason)
    else:
        out.reject(item, done.reason)


def write_image(path: Path, image: Image.Image | bytes) -> Path:
    """Writes a picture or encoded bytes so that no reader sees half of it; returns `path`."""
    if not isinstance(image, bytes):
        buffer = io.BytesIO()
        form = Image.registered_extensions()[path.suffix.lower()]
        image.save(buffer, form, compress_level=COMPRESS)
        image = buffer.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    # another process, of another machine too, may be writing the same image
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.write_bytes(image)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return path


def in_order(
    step: Step, items: Iterator[Item], workers: int
) -> Iterator[tuple[Item, Done | Rejected]]:
    """Each item with what became of it, in order, at most `AHEAD` x workers ahead."""
    if workers <= 1:
        for item in items:
            yield item, _unused(item) if item.problem else step(_bare(item))
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, step.work.__module__])
    pool = ProcessPoolExecutor(workers, context, _begin_worker, (step,))
    waiting: deque = deque()
    try:
        for item in items:
            waiting.append((item, None if item.problem else pool.submit(_in_worker, _bare(item))))
            if len(waiting) >= AHEAD * workers:
                yield _next(waiting)
        while waiting:
            yield _next(waiting)
    finally:
        pool.shutdown(cancel_futures=True)


def _next(waiting: deque) -> tuple[Item, Done | Rejected]:
    item, future = waiting.popleft()
    if future is None:
        return item, _unused(item)
    try:
        return item, future.result()
    except RecursionError:
        return item, Rejected(f"{item.where}: expected values nested less deeply")
    except BrokenProcessPool:
        raise SampleError(
            f"{item.where}: a worker process died on it or on one of the {len(waiting)} after it "
            "(out of memory?); what was done before is kept"
        ) from None


def _unused(item: Item) -> Rejected:
    return Rejected(item.problem, left_out=item.kind is not None)


def _bare(item: Item) -> Item:
    return Item(item.index, item.where, item.value)


_step: Step | None = None


def _begin_worker(step: Step) -> None:
    """Leaves Ctrl-C to the parent, ends with the parent, and uses one core."""
    global _step
    follow_parent()
    one_thread()
    _step = step


def _in_worker(item: Item) -> Done | Rejected:
    return _step(item)
