"""Models that are really smaller: heads removed for good, with what stands for them in the weights that are left."""
