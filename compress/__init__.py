"""Quantize, prune, distil."""
