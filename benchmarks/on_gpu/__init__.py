"""Everything that one visit to a machine with a GPU answers, part by part: ``bash benchmarks/gpu.sh all``."""
