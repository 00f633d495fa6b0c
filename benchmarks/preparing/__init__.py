"""How good `groundkern prepare` is: precision and recall of marks and of phrases."""
