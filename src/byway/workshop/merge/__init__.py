"""Merge an adapter into a model's files, with proof that the result is right."""
