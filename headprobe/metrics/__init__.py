"""Definitions of what is measured: pure functions and, beside them, torchmetrics whose states are sums over images."""
