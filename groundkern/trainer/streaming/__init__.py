"""Training data that is read as it comes, for files that do not fit."""
