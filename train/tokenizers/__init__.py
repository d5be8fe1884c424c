"""Tokenizers: text to ids and back, byte for byte."""
