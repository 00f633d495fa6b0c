"""Whole training steps: their model, their losses, how they are measured."""
