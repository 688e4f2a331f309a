"""The quickstart behind ``byway quickstart``: its rows, their scoring, and the run itself."""
