"""`make gpu`: all that a few minutes on a GPU can tell, even if parts of it fail."""
