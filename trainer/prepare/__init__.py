"""`python -m trainer prepare`: from raw images and texts to canonical samples (docs/prepare.md)."""
