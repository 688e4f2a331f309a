"""The attention of packed documents, and the ways to compute it."""
