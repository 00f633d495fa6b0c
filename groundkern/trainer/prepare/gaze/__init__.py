"""`prepare gaze`: where people looked, as regions of answers."""
