"""The test suites of other linear cross entropies, as tables of cases that run on ours.

A case has their shapes, dtypes, options and tolerances; the code that draws tensors, computes the
truth and compares is ours. `python -m tests.peers` runs every case at their sizes and prints what
docs/ops/peers.md holds; pytest runs some of each test's at reduced sizes.
"""
