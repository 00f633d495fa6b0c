"""Triton launches: noted as they happen, or counted for a GPU that is not here."""
