"""Virtual tokens at a model's input: their template, their columns in a row, and the side paths that insert and remove
them."""
