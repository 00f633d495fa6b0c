"""What `GroundingMixin` watches in a run: finite steps, held-out means, the terms' gradients."""
