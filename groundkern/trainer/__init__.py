"""Fine-tune a vision-language model with grounding supervision: `groundkern`."""
