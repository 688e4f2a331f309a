"""Merge an adapter into a model's files, and certify the result."""
