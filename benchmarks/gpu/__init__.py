"""`make gpu`: everything worth knowing from a few minutes on a GPU, whatever fails there."""
