"""SMAM labels: which words of an answer are printed where in its images."""
