"""Packed batches: attention document by document, and the ways to compute it."""
