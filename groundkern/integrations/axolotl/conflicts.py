"""What a config of axolotl says that cannot go with objectives, each in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from groundkern.integrations.axolotl.rows import folders_of

WITH = "with groundkern.objectives"
LOSS = "the loss is the attached one"
BATCH = "batches are made by GroundingCollator"
ROWS = "rows have to reach the collator as they are in the file"
WHOLE = "every process needs whole sequences"
LABELS = "labels are every assistant's text with the token that ends its turn"

# Each is refused if it is on: its name, and why it has to be off.
OFF = {
    "sample_packing": BATCH,
    "eval_sample_packing": BATCH,
    "batch_flattening": BATCH,
    "pad_to_sequence_len": BATCH,
    "streaming": ROWS,
    "pretraining_dataset": ROWS,
    "rl": LOSS,
    "reward_model": LOSS,
    "process_reward_model": LOSS,
    "orpo_alpha": LOSS,
    "kd_trainer": LOSS,
    "use_eaft": LOSS,
    "use_dft": LOSS,
    "diffusion_lm": LOSS,
    "liger_cross_entropy": LOSS,
    "liger_fused_linear_cross_entropy": LOSS,
    "cut_cross_entropy": LOSS,
    "chunked_cross_entropy": LOSS,
    "flash_attn_cross_entropy": LOSS,
    "train_on_inputs": LABELS,
    "role_boundaries": LABELS,
    "image_size": "the processor alone sizes images",
}
# These have to be what stands here, or not be given.
ONLY = {
    "context_parallel_size": (1, WHOLE),
    "tensor_parallel_size": (1, WHOLE),
    "expert_parallel_size": (1, WHOLE),
    "sequence_parallel_degree": (1, WHOLE),
}
# The same of each entry of `datasets` and `test_datasets`.
OF_DATASET = {
    "type": ("chat_template", ROWS),
    "field_messages": ("messages", ROWS),
    "roles_to_train": (["assistant"], LABELS),
    "train_on_eos": ("turn", LABELS),
    "train_on_eot": ("turn", LABELS),
    "message_field_training": (None, 'an answer that is not trained has "train": false'),
}


def conflicts(cfg: Any) -> Iterator[str]:
    """One sentence for each setting that does not go with objectives.

    Args:
        cfg: axolotl's config, validated, as a model of pydantic or the dictionary made of it.
    """
    for name, why in OFF.items():
        if value := _get(cfg, name):
            yield f"`{name}`: expected it off {WITH} ({why}), got {value!r}"
    for name, (wanted, why) in ONLY.items():
        if (value := _get(cfg, name)) not in (None, wanted):
            yield f"`{name}`: expected {wanted} {WITH} ({why}), got {value!r}"
    if not _get(cfg, "processor_type"):
        yield "`processor_type`: expected the model's, such as AutoProcessor, got none"
    if not _get(cfg, "skip_prepare_dataset"):
        yield f"`skip_prepare_dataset`: expected true ({ROWS}), got false"
    if _get(cfg, "remove_unused_columns") is not False:
        value = _get(cfg, "remove_unused_columns")
        yield f"`remove_unused_columns`: expected false ({ROWS}), got {value}"
    for kind in ("datasets", "test_datasets"):
        folders = {folder.absolute() for folder in folders_of(_get(cfg, kind))}
        if len(folders) > 1 and not _get(_get(cfg, "groundkern"), "root"):
            start = f"a folder that image paths of all {kind} start from"
            yield f"`groundkern.root`: expected {start}, got {len(folders)} folders of files"
        for i, entry in enumerate(_get(cfg, kind) or ()):
            yield from _conflicts_of_dataset(f"{kind}[{i}]", entry)


def _conflicts_of_dataset(where: str, entry: Any) -> Iterator[str]:
    for name, (wanted, why) in OF_DATASET.items():
        if (value := _get(entry, name)) not in (None, wanted):
            yield f"`{where}.{name}`: expected {wanted} {WITH} ({why}), got {value!r}"


def _get(cfg: Any, name: str) -> Any:
    """A setting of a model or a dictionary; None if neither has it."""
    return cfg.get(name) if isinstance(cfg, dict) else getattr(cfg, name, None)
