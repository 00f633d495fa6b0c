"""Noun phrases of answers, their subjects and their composites (HIST)."""
