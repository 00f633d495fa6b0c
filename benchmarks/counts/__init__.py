"""Costs that do not vary from run to run, compared with counts.json."""
