"""Adapters in the format of the adapters library (AdapterHub)."""
