"""Machinery that the methods with a low-rank update share."""
