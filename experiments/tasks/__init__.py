"""Tasks: what is reported of each, its metrics, and the table of them."""
