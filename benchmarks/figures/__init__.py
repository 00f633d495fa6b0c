"""What a person sees of results: figures, the printed table, how cost grows."""
