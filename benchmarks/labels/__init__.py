"""`python -m benchmarks.labels`: which words of which tokenizers have a label worth learning."""
