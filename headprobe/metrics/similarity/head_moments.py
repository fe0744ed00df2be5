"""Centred moments of a block of heads: what every similarity is computed from. Numpy alone, float64."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


IntArray = NDArray[np.int64]


class CrossMoments(NamedTuple):
    """Sums over pairs of samples (x, y), both centred."""

    samples: float  #: pairs
    products: FloatArray  #: sum x y^T, ``[width, width]``
    norm_products: FloatArray  #: sum |x_g|^2 |y_h|^2, ``[heads, heads]``


class HeadMoments(NamedTuple):
    """Moments of all heads of a block about their means; `width` is the channels of all its heads."""

    layer: IntArray  #: ``[heads]``
    head: IntArray  #: number within the layer, ``[heads]``
    dims: tuple[int, ...]  #: channels of each head
    sampling: str  #: what a sample is: ``tokens``, ``patches``, ``class`` or ``mean``
    images: int
    mean: FloatArray  #: ``[width]``
    offset: FloatArray  #: of the mean from the shift that the sums were taken about, ``[width]``
    norms: FloatArray  #: sum |x_h|^2, ``[heads]``
    own: CrossMoments  #: of each sample with itself
    shifted: CrossMoments | None  #: of each image with the next one of its unit; None where not asked for
    resolution: float  #: spacing of the numbers that the model computed in, relative: 1.2e-7 for float32
    rounding: float  #: eps of the sums' products where they were coarser than float64, else 0

    @property
    def offsets(self) -> IntArray:
        """First column of each head, and the width, ``[heads + 1]``."""
        return np.concatenate([[0], np.cumsum(self.dims)]).astype(np.int64)


def take_apart(extended: FloatArray, width: int) -> CrossMoments:
    """Name the parts of an extended moment matrix (see `extended_moments`) about the mean."""
    return CrossMoments(float(extended[-1, -1]), extended[:width, :width], extended[width:-1, width:-1])
