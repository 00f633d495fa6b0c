"""`groundkern doctor`: what works with a model, tried on images, as a page."""
