"""Names for the kinds of numpy arrays that metrics give and take. Needs no torch."""

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
