"""Optimizations of training on a frozen base. Each is exact and has a plain twin to compare it with."""
