"""Proofs that masks take effect on a model, layer by layer."""
