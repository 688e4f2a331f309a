"""The arithmetic in which a frozen base multiplies: float32 over 16-bit weights, or 8-bit integers."""
