"""Boxes and points that a text writes: read, written, and what their numbers count."""
