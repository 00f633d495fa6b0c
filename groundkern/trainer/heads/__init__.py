"""`groundkern heads`: ranks the attention heads of a model by how well they localise."""
