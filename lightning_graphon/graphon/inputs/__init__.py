"""Which inputs a mask reads, and how many of them together."""
