"""What makes a run repeatable: its key and record, its results as files."""
