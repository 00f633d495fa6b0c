"""Fine-tune a vision-language model with grounding losses in transformers' Trainer.

python examples/hf_trainer.py --model Qwen/Qwen2.5-VL-3B-Instruct --data train.jsonl
"""

import argparse

import torch
from transformers import AutoModelForImageTextToText, TrainingArguments

from groundkern.hf import (
    DvSft,
    GroundingCollator,
    GroundingTrainer,
    Klal,
    Smam,
    attach,
    load_processor,
)
from groundkern.trainer import demo, load_samples

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="folder or hub name; without it a tiny model is made")
parser.add_argument("--data", help="file of samples (docs/data); without it some are drawn")
parser.add_argument("--output", default="out/hf_trainer")
parser.add_argument("--steps", type=int, default=20)
options = parser.parse_args()

path = options.model or demo.small_model()
model = AutoModelForImageTextToText.from_pretrained(path)
processor = load_processor(path)
examples = load_samples(options.data) if options.data else demo.examples(64)

attach(model, smam=Smam(), dv_sft=DvSft(), klal=Klal())
trainer = GroundingTrainer(
    model,
    TrainingArguments(
        options.output,
        max_steps=options.steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-5 if options.model else 2e-3,
        bf16=torch.cuda.is_available(),
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    ),
    train_dataset=examples,
    data_collator=GroundingCollator(processor, model.config),
)
trainer.train()
trainer.save_model()
processor.save_pretrained(options.output)
