"""How good a model is on held-out samples: metrics of answers and of where it looks, intervals."""
