"""Plans a training run for a machine that is not here."""
