"""When to measure and what to write: one callback a file."""
