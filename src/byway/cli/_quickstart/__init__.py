"""The quickstart's job: the rows that ship with the package, and the measure that says how well a model does it."""
