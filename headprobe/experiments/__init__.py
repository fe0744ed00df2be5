"""Runs made of masks: which masks, ablations and statistics answer a question together."""
