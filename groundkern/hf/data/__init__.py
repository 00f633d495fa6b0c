"""From examples to batches: token positions, labels and the geometry of visual tokens."""
