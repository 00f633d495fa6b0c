"""How good a model is on held-out samples, and how sure that is."""
