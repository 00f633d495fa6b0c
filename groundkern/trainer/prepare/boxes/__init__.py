"""Boxes and points that answers write become regions, and are written as a family expects."""
