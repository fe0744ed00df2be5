"""A timm model and its heads: found, masked, grown, proven."""
