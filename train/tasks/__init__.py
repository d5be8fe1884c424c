"""Tasks: rows of files, what is learned of them, and what comes out."""
