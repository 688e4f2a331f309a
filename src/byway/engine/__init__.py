"""What makes training on a frozen base cheap. Every optimization here is exact and has a plain twin to compare it
with."""
