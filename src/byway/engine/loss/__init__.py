"""Losses: the output head runs only where a label is, in chunks."""
