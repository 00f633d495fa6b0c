"""A text model in transformers' Trainer whose logits are never stored.

python examples/text_lm_linear_ce.py
"""

import argparse
import resource

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput

from groundkern import linear_cross_entropy


class FusedLlamaForCausalLM(LlamaForCausalLM):
    """Llama whose loss is computed from the hidden states and the head's weight."""

    def forward(self, input_ids, labels=None, num_items_in_batch=None, **kwargs):
        if labels is None:
            return super().forward(input_ids, **kwargs)
        hidden = self.model(input_ids, **kwargs).last_hidden_state[:, :-1]
        labels = labels[:, 1:]
        total = linear_cross_entropy(hidden, self.lm_head.weight, labels, reduction="sum").loss
        return CausalLMOutput(total / (num_items_in_batch or (labels != -100).sum()))


def peak():
    """The most memory so far, in MiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="a Llama's folder or hub name; without it a small one is made")
parser.add_argument("--length", type=int, default=1024, help="tokens of a sample")
parser.add_argument("--steps", type=int, default=3)
options = parser.parse_args()

torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
small = LlamaConfig(vocab_size=64_000, num_attention_heads=4, num_key_value_heads=2, **sizes)
made = FusedLlamaForCausalLM.from_pretrained if options.model else FusedLlamaForCausalLM
model = made(options.model or small)
texts = torch.randint(model.config.vocab_size, (8, options.length))  # yours: tokenised texts
dataset = [{"input_ids": text, "labels": text} for text in texts]

settings = {"max_steps": options.steps, "per_device_train_batch_size": 1, "logging_steps": 1}
settings |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
start = peak()
Trainer(model, TrainingArguments("out/text_lm", **settings), train_dataset=dataset).train()
fused = peak() - start

batch = {name: x[None].to(model.device) for name, x in dataset[0].items()}
ours, theirs = model(**batch).loss, LlamaForCausalLM.forward(model, **batch).loss
theirs.backward()  # with logits [1, length, vocabulary] and their gradient
print(f"loss {ours:.5f}, with logits {theirs:.5f}")
print(f"peak memory above the start: {fused:.0f} MiB, with logits {peak() - start:.0f} MiB")
