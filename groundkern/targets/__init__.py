"""The geometry under `groundkern.maps`: shapes and points with a spread over visual tokens."""
