"""What a kernel's machine code says: SASS, AMD's assembly, Triton's own IR."""
