"""What the work costs, computed from sizes: floors, and the memory and traffic of our Triton
loss."""
