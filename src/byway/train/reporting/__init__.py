"""What a run reports: events, metrics, and the page for people."""
