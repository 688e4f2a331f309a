"""What the backward pass need not keep: everything below the frontier, and whatever can be recomputed."""
