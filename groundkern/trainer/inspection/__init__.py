"""`groundkern inspect`: samples as one self-contained page, as the model will see them."""
