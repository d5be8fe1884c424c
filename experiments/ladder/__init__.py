"""The ladder: one technique a rung, each measured in time to a loss."""
