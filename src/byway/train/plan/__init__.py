"""The plan of a run in numbers, and the memory it needs."""
