"""Definitions of what is measured: pure functions and, beside them, torchmetrics that keep sums over images."""
