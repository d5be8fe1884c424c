"""Methods: what a run may be given beside its optimizer, and the table of them."""
