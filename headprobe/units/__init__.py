"""Exactly once, all of it: the pieces of the data, their sums in memory and on disk."""
