"""Compression after training: what there is, and what it costs and brings."""
