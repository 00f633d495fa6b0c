"""`groundkern prepare`: from raw images and texts to canonical samples (docs/data/prepare.md)."""
