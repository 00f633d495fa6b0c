"""SMAM labels: which words of an answer stand where in its images."""
