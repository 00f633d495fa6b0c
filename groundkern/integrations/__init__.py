"""groundkern in other people's training programs; each is imported only when it is named."""
