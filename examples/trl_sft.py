"""Fine-tune a vision-language model with grounding losses in TRL's SFTTrainer.

python examples/trl_sft.py --model Qwen/Qwen2.5-VL-3B-Instruct --data train.jsonl
"""

import argparse

import torch
from datasets import Dataset
from transformers import AutoModelForImageTextToText
from trl import SFTConfig, SFTTrainer

from groundkern.hf import GroundingCollator, GroundingMixin, Klal, Smam, attach, load_processor
from groundkern.trainer import demo, load_samples


class GroundingSFTTrainer(GroundingMixin, SFTTrainer):
    """TRL's trainer, whose loss and logs have the terms of an attached model."""


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="folder or hub name; without it a tiny model is made")
parser.add_argument("--data", help="file of samples (docs/data); without it some are drawn")
parser.add_argument("--output", default="out/trl_sft")
parser.add_argument("--steps", type=int, default=10)
options = parser.parse_args()

path = options.model or demo.small_model()
model = AutoModelForImageTextToText.from_pretrained(path)
processor = load_processor(path)
examples = load_samples(options.data) if options.data else demo.examples(64)

collate = GroundingCollator(processor, attach(model, smam=Smam(), klal=Klal()).config)
trainer = GroundingSFTTrainer(
    model,
    SFTConfig(
        options.output,
        max_steps=options.steps,
        per_device_train_batch_size=4,
        learning_rate=1e-5 if options.model else 2e-3,
        bf16=torch.cuda.is_available(),
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
    ),
    train_dataset=Dataset.from_dict({"row": range(len(examples))}),  # TRL takes nothing else
    processing_class=processor,
    data_collator=lambda rows: collate([examples[row["row"]] for row in rows]),
)
trainer.train()
