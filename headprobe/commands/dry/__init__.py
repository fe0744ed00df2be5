"""The plan that `--dry-run` prints: masks, passes, time, memory, and the smallest drop that images resolve."""
