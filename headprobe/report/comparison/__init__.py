"""What a comparison of runs prints and draws."""
