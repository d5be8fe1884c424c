"""Hugging Face's GPT-2 in torch, on the tokens, batches and evaluation of our own runs."""
