"""The metric whose states are sums: merged by adding, written and read back as arrays, kept in full precision."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor
from torchmetrics import Metric

Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of each state."""


class SumMetric(Metric):
    """A metric of a whole data set as sums over its images.

    Any split over batches, workers and processes gives the same integers, and the same order of additions the same
    floats to the last bit. The states keep int64 and float64 whatever precision the module around them is cast to.

    Args:
        layout: Shape and dtype of each state; all begin at 0.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    def __init__(self, layout: Layout) -> None:
        super().__init__(compute_with_cache=False)  # `merge` changes states behind the cache's back
        self.layout = dict(layout)
        for name, (shape, dtype) in self.layout.items():
            self.add_state(name, default=torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")

    @property
    def update_called(self) -> bool:
        """Always true: sums over no image are right as they are, so torchmetrics need not warn of them."""
        return True

    @property
    def signature(self) -> tuple[Any, ...]:
        """What two metrics must have in common to be merged; the states' shapes, if nothing else."""
        return (type(self), tuple(self.layout.items()))

    def merge(self, other: "SumMetric") -> None:
        """Add the sums of other images.

        Raises:
            ValueError: The other metric describes another model or other statistics.
        """
        if self.signature != other.signature:
            raise ValueError(f"only metrics of the same model and options can be merged, got {other.signature}")
        self.add({name: getattr(other, name) for name in self.layout})

    def to_arrays(self) -> dict[str, NDArray[np.generic]]:
        """Return copies of all states by name."""
        return {name: getattr(self, name).cpu().numpy().copy() for name in self.layout}

    def empty(self) -> Self:
        """Return a metric of the same model and options that has seen nothing."""
        raise NotImplementedError

    def from_arrays(self, arrays: Mapping[str, NDArray[np.generic]]) -> Self:
        """Return a metric of the same model and options, on the CPU, with the sums that `to_arrays` gave.

        Raises:
            ValueError: An array is missing or unknown, or has another dtype or shape than its state.
        """
        if arrays.keys() != self.layout.keys():
            raise ValueError(f"the arrays must be {', '.join(sorted(self.layout))}, got {', '.join(sorted(arrays))}")
        metric = self.empty()
        for name, blank in metric.to_arrays().items():
            array = arrays[name]
            if (array.shape, array.dtype) != (blank.shape, blank.dtype):
                wanted, found = (f"{a.dtype} {list(a.shape)}" for a in (blank, array))
                raise ValueError(f"array {name!r} must be {wanted}, got {found}")
        metric.add({name: torch.from_numpy(array.copy()) for name, array in arrays.items()})
        return metric

    def add(self, sums: Mapping[str, Tensor], place: int | slice | tuple[Any, ...] = ()) -> None:
        """Add to states, or to the part of each that `place` names."""
        for name, value in sums.items():  # out of place: a state made in inference mode cannot be changed outside it
            state = getattr(self, name).clone()
            state[place] += value.to(state.device, state.dtype)
            setattr(self, name, state)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Self:
        """Follow the module to its device but not to its dtype.

        torchmetrics guards `half` and the like, yet ``module.to(torch.bfloat16)``, as Lightning's bf16-true calls it,
        would round the sums.
        """
        super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).device), exclude_state)
        return self


def mean_and_error(
    total: NDArray[np.float64], square: NDArray[np.float64], images: NDArray[np.generic]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return mean and standard error over images from sums and sums of squares; NaN where there are too few images."""
    count = np.asarray(images, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = total / np.where(count > 0, count, np.nan)
        variance = np.maximum(square - total * mean, 0) / np.where(count > 1, count - 1, np.nan)
        return mean, np.sqrt(variance / count)


# -- Work on many small matrices, which threads make slower and not faster --


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
