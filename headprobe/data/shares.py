"""How many images each unit gives, and how many worker processes read them."""

import os
from collections.abc import Sequence

MOST_WORKERS = 8  # decoding is 3 ms an image: 8 processes outrun all but the smallest models on the fastest GPUs
FEW_IMAGES = 2000  # read in seconds: starting processes would take longer


def even_shares(sizes: Sequence[int], images: int) -> list[int]:
    """Share `images` evenly among units of these sizes; what a small unit cannot give, larger ones do.

    The shares add up to `images`, or to all rows where there are fewer.
    """
    shares = [0] * len(sizes)
    smallest_first = sorted(range(len(sizes)), key=lambda unit: (sizes[unit], unit))
    for done, unit in enumerate(smallest_first):
        shares[unit] = min(sizes[unit], images // (len(sizes) - done))
        images -= shares[unit]
    return shares


def default_workers(units: int, images: int | None, processes: int, local_processes: int) -> int:
    """Choose how many worker processes read for one process of a run.

    Never more than its units or its share of the machine's cores, less one for itself; none for a small dataset.
    """
    if images is not None and images <= FEW_IMAGES:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    own_units = -(-units // processes)
    return max(0, min(MOST_WORKERS, cores // local_processes - 1, own_units))
