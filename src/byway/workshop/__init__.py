"""Tools for adapters and models as files: merge, combine, inspect."""
