"""Triton launches: noted as they happen, or counted without a GPU."""
