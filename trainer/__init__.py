"""Fine-tune a vision-language model with grounding supervision: `python -m trainer`."""
