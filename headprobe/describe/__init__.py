"""What is said of every head beside its drop: one kind of statistic a file."""
