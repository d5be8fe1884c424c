"""The Transformer and its parts, rules over parameter paths, weights in from and out to other formats."""
