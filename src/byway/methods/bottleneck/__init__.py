"""Machinery that the bottleneck methods share."""
