"""HIST labels: phrases of an answer, their subjects, and composites of several phrases."""

from trainer.prepare.phrases.command import HELP, add_arguments, run

__all__ = ["HELP", "add_arguments", "run"]
