"""The metric that is a set of sums over images: merged by adding, written and read back as arrays, never rounded."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from headprobe.metrics.arrays import FloatArray

Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of each state."""


class SumMetric(Metric):
    """A metric of a whole data set as sums over its images.

    Any split of the images over batches, workers and processes gives the same integers, and the same order of
    additions gives the same floats to the last bit. The states keep int64 and float64 whatever precision the module
    around them is cast to.

    A subclass gives the layout of its states, its `signature`, and an `empty` metric of the same options. Where plain
    adding would be wrong, as for sums about different shifts, it also overrides `merge`.

    Args:
        layout: Shape and dtype of each state. All begin at 0.
        synced: Let torchmetrics add up the states of all processes before `compute`. Without it processes are joined
            by `to_arrays`, `from_arrays` and `merge` only.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    MERGEABLE: ClassVar[str] = "metrics of the same model and options"  #: what can be merged, for messages

    def __init__(self, layout: Layout, synced: bool = True) -> None:
        # no cache: `merge` changes the states without torchmetrics noticing it
        super().__init__(compute_with_cache=False, sync_on_compute=synced)
        self.layout = dict(layout)
        for name, (_, dtype) in self.layout.items():
            # torchmetrics keeps a copy of what a state begins with: of large sums there would be twice as much
            self.add_state(name, torch.zeros((), dtype=dtype), dist_reduce_fx="sum" if synced else None)
        self._set_to_zero()

    def reset(self) -> None:
        """Forget all images."""
        super().reset()
        self._set_to_zero()

    def _set_to_zero(self) -> None:
        for name, (shape, dtype) in self.layout.items():
            setattr(self, name, torch.zeros(shape, dtype=dtype, device=getattr(self, name).device))

    @property
    def update_called(self) -> bool:
        """Always true: sums over no image are right as they are, so torchmetrics need not warn of them."""
        return True

    @property
    @abstractmethod
    def signature(self) -> tuple[Any, ...]:
        """What two metrics must have in common to be merged."""

    @property
    def option_arrays(self) -> dict[str, NDArray[np.generic]]:
        """Options that `to_arrays` writes beside the states: the arrays then describe themselves."""
        return {}

    @abstractmethod
    def empty(self) -> Self:
        """Return a metric of the same model and options without images, on the CPU."""

    def merge(self, other: Self) -> None:
        """Add the sums of other images.

        Raises:
            ValueError: The other metric has another signature.
        """
        self.refuse_unequal(other, self.signature)
        self.add({name: getattr(other, name) for name in self.layout})

    def refuse_unequal(self, other: "SumMetric", wanted: tuple[Any, ...]) -> None:
        """Refuse to merge a metric of another kind or of another signature than `wanted`.

        Raises:
            ValueError: With both signatures.
        """
        if type(self) is not type(other) or wanted != other.signature:
            raise ValueError(f"only {self.MERGEABLE} can be merged: {wanted} here, got {other.signature}")

    def to_arrays(self) -> dict[str, NDArray[np.generic]]:
        """Return copies of all states by name, behind the `option_arrays`."""
        states = {name: getattr(self, name).cpu().numpy().copy() for name in self.layout}
        return {**self.option_arrays, **states}

    def from_arrays(self, arrays: Mapping[str, NDArray[np.generic]]) -> Self:
        """Return a new metric of the same model and options, on the CPU, with the sums that `to_arrays` gave.

        Raises:
            ValueError: An array is missing or unknown, a state has another dtype or shape, or an option differs.
        """
        metric = self.empty()
        options = metric.option_arrays
        names = {*options, *self.layout}
        if arrays.keys() != names:
            raise ValueError(f"the arrays must be {', '.join(sorted(names))}, got {', '.join(sorted(arrays))}")

        for name, option in options.items():
            self._refuse_array(name, str(option.tolist()), str(arrays[name].tolist()))
        for name in self.layout:
            self._refuse_array(name, _dtype_and_shape(getattr(metric, name)), _dtype_and_shape(arrays[name]))
            setattr(metric, name, torch.from_numpy(arrays[name].copy()))
        return metric

    def _refuse_array(self, name: str, wanted: str, found: str) -> None:
        """Refuse an array that another metric gave."""
        if wanted != found:
            raise ValueError(f"only {self.MERGEABLE} can be merged: array {name!r} must be {wanted}, got {found}")

    def add(self, sums: Mapping[str, Tensor], place: int | slice | tuple[Any, ...] = ()) -> None:
        """Add to states, or to the part of each that `place` names."""
        for name, value in sums.items():
            # a copy: a state that was made in inference mode cannot be changed outside it
            state = getattr(self, name).clone()
            state[place] += value.to(state.device, state.dtype)
            setattr(self, name, state)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Self:
        """Follow the module to its device but not to its dtype.

        torchmetrics guards `half` and the like, yet `module.to(torch.bfloat16)`, as Lightning's bf16-true calls it,
        would round the sums.
        """
        super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).device), exclude_state)
        return self


def _dtype_and_shape(array: Tensor | NDArray[np.generic]) -> str:
    """Return dtype and shape for messages, such as `float64 [2, 3]`."""
    return f"{str(array.dtype).removeprefix('torch.')} {list(array.shape)}"


def mean_and_error(total: FloatArray, square: FloatArray, images: NDArray[np.generic]) -> tuple[FloatArray, FloatArray]:
    """Return mean and standard error over images from sums and sums of squares.

    Both are NaN without images; the standard error is NaN for a single image too.
    """
    count = np.asarray(images, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = total / np.where(count > 0, count, np.nan)
        variance = np.maximum(square - total * mean, 0) / np.where(count > 1, count - 1, np.nan)
        return mean, np.sqrt(variance / count)


def double_device(device: torch.device) -> torch.device:
    """Return the device for float64 sums: the CPU beside Apple's GPUs, which have no float64."""
    return torch.device("cpu") if device.type == "mps" else device
