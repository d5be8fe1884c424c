"""What a person runs: one file per experiment, all settings visible."""
