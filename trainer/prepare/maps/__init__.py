"""KLAL samples with target maps, drawn or from annotations (docs/prepare-maps.md)."""
