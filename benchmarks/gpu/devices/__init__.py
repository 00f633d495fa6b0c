"""What the steps run on: a GPU, a stand-in for rehearsals, or tensors without storage."""
