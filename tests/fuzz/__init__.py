"""Fuzzing of everything that parses: `python -m tests.fuzz --help`, and CONTRIBUTING.md."""
