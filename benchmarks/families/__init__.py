"""Does groundkern work with a model? Every vision-language type of transformers is tried."""
