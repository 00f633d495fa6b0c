"""Several processes against one: losses, weights, memory, and what happens when one is killed."""
