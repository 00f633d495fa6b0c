"""Batches of a stream: each process loads its own, in its own workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from groundkern.trainer.streaming.stream import SampleStream


def stream_batches(
    stream: SampleStream, collate: Callable[[list], dict[str, Any]], args: TrainingArguments
) -> DataLoader:
    """The batches of this process.

    accelerate would read a stream on the first process and send the others their part, or read all
    of it on each; here `stream.rank` and `stream.ranks` say what a process reads.

    Args:
        stream: the samples.
        collate: makes a batch.
        args: the run's.
    """
    return DataLoader(
        stream,
        batch_size=args.per_device_train_batch_size,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        prefetch_factor=args.dataloader_prefetch_factor,
        multiprocessing_context=args.dataloader_multiprocessing_context,
        # its own: the seed of workers would be drawn from the state that a checkpoint restored
        generator=torch.Generator().manual_seed(args.seed),
    )
