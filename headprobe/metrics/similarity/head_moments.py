"""Centred moments of a block of heads: what every similarity is computed from. Numpy alone, float64."""

from typing import NamedTuple

import numpy as np

from headprobe.metrics.arrays import FloatArray, IntArray


class CrossMoments(NamedTuple):
    """Sums over pairs of samples (x, y), both centred."""

    samples: float  #: pairs
    products: FloatArray  #: sum x y^T, `[width, width]`
    norm_products: FloatArray  #: sum |x_g|^2 |y_h|^2, `[heads, heads]`


class HeadMoments(NamedTuple):
    """Moments of all heads of a block about their means; `width` is the channels of all its heads."""

    layer: IntArray  #: number of each head's layer, `[heads]`
    head: IntArray  #: number within the layer, `[heads]`
    dims: tuple[int, ...]  #: channels of each head
    sampling: str  #: what a sample is: `tokens`, `patches`, `class` or `mean`
    images: int
    mean: FloatArray  #: `[width]`
    offset: FloatArray  #: of the mean from the shift that the sums were taken about, `[width]`
    norms: FloatArray  #: sum |x_h|^2, `[heads]`
    own: CrossMoments  #: of each sample with itself
    shifted: (
        CrossMoments | None
    )  #: of each image with the next one of its unit, a row's head with itself and later ones
    #: (NaN for earlier ones, which no noise floor needs); None where it was not summed
    resolution: float  #: spacing of the numbers that the model computed in, relative: 1.2e-7 for float32
    rounding: float  #: eps of the sums' products where they were coarser than float64, else 0

    @property
    def offsets(self) -> IntArray:
        """First column of each head, and the width, `[heads + 1]`."""
        return np.concatenate([[0], np.cumsum(self.dims)]).astype(np.int64)


def take_apart(extended: FloatArray, width: int) -> CrossMoments:
    """Name the parts of an extended moment matrix about the mean (see `extended_moments`).

    Its rows and columns are the `width` channels, then the heads' squared norms, then the constant 1.
    """
    samples = float(extended[-1, -1])
    return CrossMoments(samples, extended[:width, :width], extended[width:-1, width:-1])


def without_earlier_heads(cross: CrossMoments, dims: tuple[int, ...]) -> CrossMoments:
    """Return cross moments with NaN where a row's head stands beside an earlier one, which `add_cross` leaves out."""
    head = np.repeat(np.arange(len(dims)), dims)  # of each channel
    own, of_heads = (number[:, None] <= number for number in (head, np.arange(len(dims))))
    return cross._replace(
        products=np.where(own, cross.products, np.nan), norm_products=np.where(of_heads, cross.norm_products, np.nan)
    )
