"""Tasks: their data, their metrics and reports, and the table of them."""
