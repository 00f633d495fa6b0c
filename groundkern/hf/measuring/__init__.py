"""The places of visual tokens, measured on a processor and a model instead of known by a rule."""
