"""Classifiers that stand in place of a model's own: class means, nearest neighbours, a linear head from a file."""
