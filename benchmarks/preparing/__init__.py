"""How good `python -m trainer prepare` is: precision and recall of marks and of phrases."""
