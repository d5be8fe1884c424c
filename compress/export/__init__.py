"""Export: files that other programs read, and how ours are described."""
