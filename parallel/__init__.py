"""Meshes, placement and collectives."""
