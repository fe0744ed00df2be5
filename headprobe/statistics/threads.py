"""Work on many small matrices, which threads make slower and not faster."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from threadpoolctl import threadpool_limits


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch and BLAS compute on one thread while the context is open.

    Their threads wait for each other after each small matrix: on two shared cores that was seen to take sixty times as
    long as the work itself.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(limits=1, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(threads)
