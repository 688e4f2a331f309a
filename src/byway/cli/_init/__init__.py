"""The recipe and the rows that ``byway init`` writes."""
