"""Measurements of groundkern: not part of the wheel."""
