"""Bases quantized while loading. One file a library."""
