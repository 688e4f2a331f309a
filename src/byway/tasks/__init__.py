"""What rows are for: how they are read, what head they need, their loss and their metrics. A file is a task."""
