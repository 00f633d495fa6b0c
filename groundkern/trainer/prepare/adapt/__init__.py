"""Public data sets as they lie on disk to canonical samples: a module for each."""
