"""A model's heads: which modules hold them, where they are concatenated, and which models are refused."""
