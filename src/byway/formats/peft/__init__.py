"""Adapters in HF peft's format."""
