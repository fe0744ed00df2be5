"""The sums behind the moments of head outputs: how they are kept, added and turned into arrays."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from headprobe.errors import RunError
from headprobe.metrics.similarity.extended_moments import move
from headprobe.metrics.similarity.head_blocks import LayerHeads, MomentOptions, make_blocks

STATES = ("sums", "shifted", "shift", "images", "resolution")


class MomentStates(Metric):
    """Extended moments (see `extended_moments`) of each block of heads, about a shift that is kept beside them.

    The states are float64 whatever the module around them is cast to. Processes are joined by `to_arrays`,
    `from_arrays` and `merge`, never by torchmetrics: sums about different shifts cannot simply be added.
    """

    sums: Tensor  #: float64 ``[groups, sum of the blocks' extended^2]``
    shifted: Tensor  #: the same of each image with the next one, ``[1, ...]``; ``[1, 0]`` without a noise floor
    shift: Tensor  #: float64 ``[sum of the blocks' widths]``
    images: Tensor  #: int64 ``[groups]``
    resolution: Tensor  #: float64 ``[]``, the coarsest eps among the outputs' number formats

    def __init__(self, layers: Sequence[LayerHeads], options: MomentOptions, pairs: Sequence[tuple[int, int]]) -> None:
        super().__init__(compute_with_cache=False, sync_on_compute=False)
        options.check()
        self.layers, self.options = tuple(LayerHeads(*layer) for layer in layers), options
        self.blocks = make_blocks(self.layers, options.scope, pairs)
        self._squares = np.cumsum([0, *(block.extended**2 for block in self.blocks)]).tolist()
        self._widths = np.cumsum([0, *(block.width for block in self.blocks)]).tolist()
        size = self._squares[-1]
        self.add_state("sums", torch.zeros(options.groups, size, dtype=torch.float64), None)
        self.add_state("shifted", torch.zeros(1, size * options.noise_floor, dtype=torch.float64), None)
        self.add_state("shift", torch.zeros(self._widths[-1], dtype=torch.float64), None)
        self.add_state("images", torch.zeros(options.groups, dtype=torch.int64), None)
        self.add_state("resolution", torch.zeros((), dtype=torch.float64), None)
        self._forget()

    @property
    def update_called(self) -> bool:
        """Always true: sums over no image are right as they are, so torchmetrics need not warn of them."""
        return True

    def merge(self, other: "MomentStates", group: int | None = None) -> None:
        """Add the sums of other images: group by group, or to `group` those of a metric that has a single group.

        Raises:
            ValueError: The other metric has other layers, blocks or options.
            RunError: A unit is open in one of them.
        """
        self._refuse_open()
        other._refuse_open()
        options = self.options if group is None else self.options._replace(groups=1)
        if (self.blocks, options) != (other.blocks, other.options):
            mine, theirs = (self.layers, options), (other.layers, other.options)
            raise ValueError(f"only equal layers, blocks and options can be merged: {mine} here, got {theirs}")
        rows = slice(None) if group is None else slice(group, group + 1)
        for number in range(len(self.blocks)):
            self._merge_block(number, other, rows)
        self._writable("images")[rows] += other.images.to(self.images.device)
        self.resolution = torch.maximum(self.resolution, other.resolution.to(self.resolution.device))

    def to_arrays(self) -> dict[str, NDArray[np.generic]]:
        """Copies of all states by name, with the layers and options: all that `from_arrays` needs.

        Raises:
            RunError: A unit is open.
        """
        self._refuse_open()
        pairs = [block.layers for block in self.blocks] if self.options.scope == "pairs" else []
        return {
            "layers": np.asarray(self.layers, dtype=np.int64).reshape(-1, 3),
            "pairs": np.asarray(pairs, dtype=np.int64).reshape(-1, 2),
            **{name: np.asarray(value) for name, value in self.options._asdict().items()},
            **{name: getattr(self, name).cpu().numpy().copy() for name in STATES},
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]]) -> Self:
        """The metric, on the CPU, that `to_arrays` was called on.

        Raises:
            ValueError: An array is missing or unknown, or has another dtype or shape than its state.
        """
        names = {"layers", "pairs", *MomentOptions._fields, *STATES}
        if arrays.keys() != names:
            raise ValueError(f"the arrays must be {', '.join(sorted(names))}, got {', '.join(sorted(arrays))}")
        options = MomentOptions(*(arrays[name].item() for name in MomentOptions._fields))
        layers = [LayerHeads(*layer) for layer in arrays["layers"].tolist()]
        metric = cls(layers, options, [(first, second) for first, second in arrays["pairs"].tolist()])
        for name in STATES:
            empty, array = getattr(metric, name).numpy(), arrays[name]
            if (empty.shape, empty.dtype) != (array.shape, array.dtype):
                wanted, found = (f"{a.dtype} {list(a.shape)}" for a in (empty, array))
                raise ValueError(f"array {name!r} must be {wanted}, got {found}")
            setattr(metric, name, torch.from_numpy(array.copy()))
        metric._shift_known = [bool(metric._block("sums", n)[:, -1, -1].any()) for n in range(len(metric.blocks))]
        return metric

    def reset(self) -> None:
        """Forget all images, those of open units too."""
        super().reset()
        self._forget()

    def _forget(self) -> None:
        self._open: set[Hashable] = set()
        self._shift_known = [False] * len(self.blocks)

    def _refuse_open(self) -> None:
        if self._open:
            raise RunError(
                f"moments are complete only between units: close them first, got {sorted(self._open, key=str)}"
            )

    def _merge_block(self, number: int, other: "MomentStates", rows: slice) -> None:
        """Add the other's block, moved to this one's shift."""
        if not other._shift_known[number]:
            return
        theirs = other._shift(number).to(self.shift.device)
        self._set_shift(number, theirs)
        step = self._shift(number) - theirs
        for name, target in (("sums", rows), ("shifted", slice(None)))[: 1 + self.options.noise_floor]:
            for mine, row in zip(self._block(name, number)[target], other._block(name, number), strict=True):
                mine += move(row.to(mine.device), step, self.blocks[number])

    def _block(self, name: str, number: int) -> Tensor:
        """View of a block's extended moments, ``[groups or 1, extended, extended]``."""
        size = self.blocks[number].extended
        return self._writable(name)[:, self._squares[number] : self._squares[number + 1]].view(-1, size, size)

    def _shift(self, number: int) -> Tensor:
        """View of a block's shift, ``[width]``."""
        return self._writable("shift")[self._widths[number] : self._widths[number + 1]]

    def _set_shift(self, number: int, shift: Tensor) -> None:
        """Choose the shift of a block that has no samples yet."""
        if not self._shift_known[number]:
            self._shift(number).copy_(shift)
            self._shift_known[number] = True

    def _writable(self, name: str) -> Tensor:
        """Return the state; one that was made in inference mode is copied, as it could not be changed outside it."""
        state: Tensor = getattr(self, name)
        if state.is_inference() and not torch.is_inference_mode_enabled():
            state = state.clone()
            setattr(self, name, state)
        return state

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Self:
        """Follow the module to its device but not to its dtype (see `PairedAccuracy`)."""
        super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).device), exclude_state)
        return self
