"""Work on adapters and models as files: merge, combine, inspect."""
