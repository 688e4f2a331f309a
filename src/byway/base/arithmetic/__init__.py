"""In which arithmetic a frozen base is multiplied."""
