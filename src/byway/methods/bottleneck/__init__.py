"""What the bottleneck methods share."""
