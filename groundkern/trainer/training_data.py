"""The samples that the settings of a run name: one file, several with weights, or a stream."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from groundkern.hf import MeasuredGeometry
from groundkern.hf.data.geometry import Geometry
from groundkern.trainer.bringing import bring
from groundkern.trainer.config import Config, ConfigError
from groundkern.trainer.data.dataset import JsonLinesDataset
from groundkern.trainer.data.epochs import EpochSampler
from groundkern.trainer.data.images import SampleError
from groundkern.trainer.data.lengths import LOOKS, LengthEstimate, looked_at
from groundkern.trainer.data.mixture import Mixture
from groundkern.trainer.data.order import Course
from groundkern.trainer.data.videos import VideoRules
from groundkern.trainer.prepare.boxes.settings import BoxSettings
from groundkern.trainer.ranks import Ranks
from groundkern.trainer.scratch import temporary_folder
from groundkern.trainer.streaming.records import reader_of
from groundkern.trainer.streaming.shards import find_shards
from groundkern.trainer.streaming.stream import SampleStream, Source
from groundkern.trainer.train_files import TrainFile

TrainingData = JsonLinesDataset | Mixture | SampleStream


def held_out_data(config: Config) -> JsonLinesDataset | None:
    """The held-out samples, if there are any.

    Raises:
        ConfigError, SampleError: as `bring` and `JsonLinesDataset`; no usable sample.
    """
    path = config.data.test
    file = None if path is None else TrainFile(path=path, root=config.data.root)
    return None if file is None else _data_set(config, file, Path("test"))


def training_data(config: Config) -> TrainingData:
    """The training samples.

    Raises:
        ConfigError, SampleError: as `bring` and `JsonLinesDataset`; a file without a usable sample;
            with `data.streaming`, files that cannot be read so.
    """
    files = config.data.train_files
    if config.data.streaming:
        return _stream(config, files)
    if not isinstance(config.data.train, list):
        return _data_set(config, files[0], Path("train"))
    names = [file.path.name for file in files]
    parts = [
        _data_set(
            config,
            file,
            Path("train") / str(number),
            name=None if names.count(file.path.name) == 1 else f"{number} ({file.path})",
        )
        for number, file in enumerate(files, 1)
    ]
    return Mixture(parts, [file.weight for file in files])


def epoch_order(
    config: Config,
    data: JsonLinesDataset | Mixture,
    course: Course,
    processor: Any,
    model_config: Any,
) -> EpochSampler | None:
    """The order of the samples of an epoch, if that is not transformers' own.

    Args:
        config: the run's settings.
        data: the training samples.
        course: of the run through them.
        processor, model_config: the model's.
    """
    if not config.data.group_by_length and not isinstance(data, Mixture):
        return None
    lengths = None
    if config.data.group_by_length:
        lengths = LengthEstimate(processor, model_config, looked_at(data)).of_all(data)
    mixed = isinstance(data, Mixture)
    return EpochSampler(
        data.sizes if mixed else [len(data)],
        data.weights if mixed else [1.0],
        seed=config.training.seed,
        lengths=lengths,
        group=course.size * course.accumulation,
    )


def prepare_stream(
    config: Config,
    stream: SampleStream,
    geometry: Geometry,
    ranks: Ranks,
    processor: Any,
    model_config: Any,
) -> None:
    """What a stream needs of the model: lengths of samples, and places that workers can find.

    Args:
        config: the run's settings.
        stream: the training samples.
        geometry: of visual tokens.
        ranks: the processes of the run.
        processor, model_config: the model's.

    Raises:
        ConfigError: places that are measured, which a worker process cannot do.
    """
    if isinstance(geometry, MeasuredGeometry) and (config.training.workers or ranks.size > 1):
        raise ConfigError(
            "`data.streaming`: expected one process and training.workers 0 with a geometry that is "
            "measured, since the sizes of images are not known ahead, got "
            f"{ranks.size} and {config.training.workers}"
        )
    if config.data.group_by_length:
        estimate = LengthEstimate(processor, model_config, stream.first(LOOKS))
        stream.group_by_length(estimate, config.training.batch_size)


def _data_set(
    config: Config, file: TrainFile, folder: Path, name: str | None = None
) -> JsonLinesDataset:
    data, path = config.data, file.path
    if not path.exists():
        raise ConfigError(f"`data`: expected a JSON-lines file, got {path} (not there)")
    brought = bring(
        path,
        root=file.root,
        folder=config.training.output / "data" / folder,
        image_roots=data.image_roots,
        boxes=_boxes(config),
        on_bad_sample=data.on_bad_sample,
        max_pixels=data.max_pixels,
    )
    found = JsonLinesDataset(
        brought.path,
        root=brought.root,
        lost=brought.lost,
        on_bad_sample=data.on_bad_sample,
        max_pixels=data.max_pixels,
        videos=video_rules(config),
        max_bad_fraction=data.max_bad_fraction,
        cache=config.training.output,
        name=name,
    )
    if len(found) == 0:
        raise SampleError(f"{path}: no usable sample among {len(found.bad)}")
    return found


def _stream(config: Config, files: list[TrainFile]) -> SampleStream:
    data = config.data
    scratch = temporary_folder()
    found = [find_shards(file.path) for file in files]
    labels = [shards.labels() for shards in found]
    several = len({label for each in labels for label in each}) < sum(map(len, labels))
    sources = [
        Source(
            shards,
            [str(path) for path in shards.files] if several else named,
            reader_of(
                shards,
                root=file.root,
                image_roots=data.image_roots,
                boxes=_boxes(config),
                max_pixels=data.max_pixels,
                videos=video_rules(config),
                scratch=scratch,
            ),
            file.weight,
        )
        for file, shards, named in zip(files, found, labels, strict=True)
    ]
    stream = SampleStream(
        sources,
        seed=config.training.seed,
        buffer=data.shuffle_buffer,
        on_bad_sample=data.on_bad_sample,
        max_bad_fraction=data.max_bad_fraction,
    )
    if len(files) > 1:
        shares = zip(files, stream.shares, strict=True)
        said = ", ".join(f"{file.path} {share:.1%}" for file, share in shares)
        print(f"Shares of the samples, by weights and about how many there are: {said}.")
    return stream


def video_rules(config: Config) -> VideoRules:
    """Which frames of videos a run takes, and what videos may be."""
    data = config.data
    return VideoRules(
        fps=data.video_fps,
        frames=data.video_frames,
        max_pixels=data.video_pixels,
        max_bytes=data.video_bytes,
        max_seconds=data.video_seconds,
    )


def _boxes(config: Config) -> Any:
    data = config.data
    return partial(BoxSettings.read_as, data.boxes, data.coord, config.model.path, prefix="--data.")
