"""Tables of results: cells that are finished, what is missing, Markdown and pictures of them."""
