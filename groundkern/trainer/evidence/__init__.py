"""Plain fine-tuning against every grounding method, on drawn tasks, at the same number of steps."""
