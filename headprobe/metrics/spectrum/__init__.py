"""Which image frequencies heads carry: log amplitudes by frequency, as sums over images."""
