"""Quantize a base while loading. One file per library."""
