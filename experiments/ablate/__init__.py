"""Tables that compare methods: `python -m experiments.ablate TOPIC`."""
