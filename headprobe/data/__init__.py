"""Images and labels for a run: opened once, cut into units, each image read exactly once whatever the process count."""
