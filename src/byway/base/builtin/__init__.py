"""The built-in base: fetched once, converted, then loaded from the cache."""
