"""What the wiring of attention losses costs on the host, layer by layer, measured without a GPU."""
