"""Features and labels from a seed, with the oracle's own arithmetic: float64 numpy."""

import numpy as np
from numpy.typing import NDArray

Features = NDArray[np.float64]
Labels = NDArray[np.int64]


def drawn(images: int, classes: int, width: int, seed: int = 0) -> tuple[Features, Labels]:
    """Return features `[images, width]` around a centre for each class, none of them of unit length; and labels."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, images)
    centres = random.standard_normal((classes, width))
    lengths = random.uniform(0.1, 30, (images, 1))
    return lengths * (centres[labels] + 1.5 * random.standard_normal((images, width))), labels


def normed(features: Features) -> Features:
    return features / np.sqrt((features**2).sum(axis=-1, keepdims=True))
