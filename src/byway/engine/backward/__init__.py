"""What the backward pass need not keep: everything below the frontier, and what can be computed again."""
