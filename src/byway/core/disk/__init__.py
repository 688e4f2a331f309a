"""Atomic file writes, strict reads, and safetensors files processed one tensor at a time."""
