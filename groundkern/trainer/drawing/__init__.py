"""Pictures with known places: text on the grid of visual tokens, charts, grids, and their texts."""
