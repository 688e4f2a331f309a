"""The optimizations of a run: which apply, and the proof that each gives the plain result."""
