"""Quantization: formats, rounding, calibrated methods, integer products, training in 8 bits."""
