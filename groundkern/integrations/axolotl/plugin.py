"""What axolotl calls, in its order: config, model, training arguments, trainer, collators, end."""

from __future__ import annotations

import logging
import os
from typing import Any

from axolotl.integrations.base import BasePlugin
from torch import nn

from groundkern.hf import GroundingMixin, attach, save_beside_adapter
from groundkern.hf.watching.even_ranks import ROWS
from groundkern.integrations.axolotl.conflicts import conflicts
from groundkern.integrations.axolotl.rows import root_of
from groundkern.integrations.axolotl.settings import GroundkernSection, section_of
from groundkern.integrations.shared.training import ProgramMixin

logger = logging.getLogger(__name__)


class GroundkernPlugin(BasePlugin):
    """Trains axolotl's model with the objectives of the section `groundkern:`.

    Without an objective it says so, and axolotl trains as it would without the plugin. With
    one, the model is attached when it is loaded (adapters included), batches are those of
    `GroundingCollator`, the trainer is axolotl's under `GroundingMixin`, and every part of the loss
    is in the log.

    Raises:
        ValueError: settings that do not go together (`conflicts`), an objective that the model
            cannot serve, another plugin whose trainer or collator comes first.
    """

    def __init__(self) -> None:
        super().__init__()
        self._model_config: Any = None

    def get_input_args(self) -> str:
        """Where axolotl finds the section's fields."""
        return "groundkern.integrations.axolotl.GroundkernArgs"

    def pre_model_load(self, cfg: Any) -> None:
        """Refuse once more what axolotl itself may have switched on since the config was read.

        Args:
            cfg: axolotl's config.

        Raises:
            ValueError: one sentence.
        """
        if section_of(cfg) is None:
            logger.warning("`groundkern.objectives`: none is on: axolotl trains by its own loss")
            return
        for sentence in conflicts(cfg):
            raise ValueError(sentence)

    def post_model_load(self, cfg: Any, model: nn.Module) -> None:
        """Attach the objectives.

        Args:
            cfg: axolotl's config.
            model: whole, with its adapters.

        Raises:
            ValueError: an objective that the model cannot serve.
        """
        section = section_of(cfg)
        if section is not None and not cfg.get("inference"):
            attach(model, **section.attached)
            self._model_config = model.config

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        """What terms are divided by is counted over all processes, which axolotl switches off.

        Args:
            cfg: axolotl's config.
        """
        return {} if section_of(cfg) is None else {"average_tokens_across_devices": True}

    def get_trainer_cls(self, cfg: Any) -> type | None:
        """axolotl's trainer, or the one of `trainer_cls`, under `GroundingMixin`.

        Args:
            cfg: axolotl's config.

        Returns:
            The class; None: axolotl's own.
        """
        section = section_of(cfg)
        if section is None:
            return None
        if cfg.get("trainer_cls"):
            from axolotl.utils.import_helper import get_cls_from_module_str

            return grounded(get_cls_from_module_str(cfg["trainer_cls"]), section)
        from axolotl.core.trainers import AxolotlTrainer

        return grounded(AxolotlTrainer, section)

    def get_collator_cls_and_kwargs(
        self, cfg: Any, is_eval: bool = False
    ) -> tuple[type, dict[str, Any]] | None:
        """The collator of rows, with a processor of its own.

        Args:
            cfg: axolotl's config.
            is_eval: whether it is for held-out samples.

        Returns:
            The class and its arguments; None: axolotl's own.
        """
        section = section_of(cfg)
        if section is None:
            return None
        from groundkern.integrations.axolotl.collator import RowCollator

        datasets = (is_eval and cfg.get("test_datasets")) or cfg.get("datasets")
        return RowCollator, {
            "processor": _processor(cfg),
            "model_config": self._model_config,
            "section": section,
            "root": root_of(section.root, datasets),
            "seed": cfg.get("seed") or 0,
            "multiple": cfg.get("pad_to_multiple_of") or 1,
        }

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Refuse a trainer or a collator that is another plugin's.

        Args:
            cfg: axolotl's config.
            trainer: as it was made.

        Raises:
            ValueError: one sentence.
        """
        if section_of(cfg) is None:
            return
        from groundkern.integrations.axolotl.collator import RowCollator

        for name, got, wanted in (
            ("trainer", trainer, GroundingMixin),
            ("collator", trainer.data_collator, RowCollator),
        ):
            if not isinstance(got, wanted):
                first = "expected GroundkernPlugin before plugins with a"
                raise ValueError(f"`plugins`: {first} {name} of their own, got {type(got)}")

    def post_train(self, cfg: Any, model: nn.Module) -> None:
        """Write what trained beside an adapter (a learned head weight) into the output folder.

        Args:
            cfg: axolotl's config.
            model: as it was trained.
        """
        if section_of(cfg) is not None:  # every rank: sharded parameters are gathered
            first = int(os.environ.get("RANK", "0")) == 0
            save_beside_adapter(model, cfg["output_dir"], write=first)


def grounded(trainer: type, section: GroundkernSection) -> type:
    """A subclass of a trainer of axolotl that trains an attached model.

    Args:
        trainer: `AxolotlTrainer` or a subclass.
        section: of the run.

    Returns:
        The class.
    """
    from axolotl.core.trainers import AxolotlTrainer

    class Grounded(ProgramMixin, trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, settings=section, **kwargs)

        def compute_loss(
            self, model: nn.Module, inputs: dict[str, Any], *rest: Any, **kwargs: Any
        ) -> Any:
            """The grounded loss; axolotl counts tokens in its own, which is not called."""
            if ROWS in inputs and isinstance(self, AxolotlTrainer):
                if self.args.include_tkps and model.training:
                    self._accumulate_token_counts(inputs)
                self._maybe_inject_mm_token_type_ids(inputs)
            return super().compute_loss(model, inputs, *rest, **kwargs)

    Grounded.__name__ = Grounded.__qualname__ = f"Grounded{trainer.__name__}"
    return Grounded


def _processor(cfg: Any) -> Any:
    """axolotl's processor with the chat template that the config names."""
    from axolotl.loaders import load_processor, load_tokenizer
    from axolotl.utils.chat_templates import get_chat_template_from_config

    tokenizer = load_tokenizer(cfg)
    processor = load_processor(cfg, tokenizer)
    if cfg.get("chat_template"):
        processor.chat_template = get_chat_template_from_config(cfg, tokenizer=tokenizer)
    return processor
