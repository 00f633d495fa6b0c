"""`groundkern evaluate`: a model's own answers, scored, compared and shown."""
