"""KLAL samples with target maps, drawn or from annotations (docs/data/prepare-maps.md)."""
