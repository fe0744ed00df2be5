"""Many masks in one forward pass whose batch grows with depth."""
