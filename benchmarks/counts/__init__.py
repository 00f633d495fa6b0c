"""Counts of what calls cost that do not wobble, held to counts.json."""
