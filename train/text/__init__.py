"""Text: where it comes from, and which of it is worth reading."""
