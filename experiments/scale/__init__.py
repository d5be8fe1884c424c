"""Tables of what parallelism costs and keeps: `python -m experiments.scale`."""
