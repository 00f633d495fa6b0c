"""SMAM labels: which words of an answer stand where in its images."""

from trainer.prepare.marks.command import HELP, add_arguments, run

__all__ = ["HELP", "add_arguments", "run"]
