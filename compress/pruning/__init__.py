"""Pruning: masks and their schedules, one-shot methods, structure taken out for good."""
