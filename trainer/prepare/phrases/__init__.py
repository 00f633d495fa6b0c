"""HIST labels: phrases of an answer, their subjects, and composites of several phrases."""
