"""Runs: how a folder of settings becomes a trained model, and how it is opened."""
