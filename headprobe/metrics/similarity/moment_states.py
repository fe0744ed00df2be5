"""The sums behind the moments of head outputs: how they are kept, added and turned into arrays."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headprobe.metrics.similarity.extended_moments import move
from headprobe.metrics.similarity.head_blocks import LayerHeads, MomentOptions, make_blocks
from headprobe.metrics.sums import SumMetric


class MomentStates(SumMetric):
    """Extended moments (see `extended_moments`) of each block of heads, about a shift that is kept beside them.

    The moments of all blocks are flattened and lie one after the other; so do the blocks' shifts. Processes are never
    joined by torchmetrics, as sums about different shifts cannot simply be added: `merge` moves them first.

    Args:
        layers: Every attention layer's heads, channels and prefix tokens.
        options: What is summed.
        pairs: Pairs of layers, for the scope `pairs`.

    Raises:
        UsageError: Options outside their choices, or pairs that do not suit the scope.
    """

    MERGEABLE = "equal layers, blocks and options"

    sums: Tensor  #: float64 `[groups, sum of the blocks' extended^2]`
    shifted: Tensor  #: the same of each image with the next one, `[1, ...]`; `[1, 0]` without a noise floor
    shift: Tensor  #: float64 `[sum of the blocks' widths]`
    images: Tensor  #: int64 `[groups]`
    resolution: Tensor  #: float64 `[]`, the coarsest eps among the outputs' number formats

    def __init__(self, layers: Sequence[LayerHeads], options: MomentOptions, pairs: Sequence[tuple[int, int]]) -> None:
        options.check()
        self.layers, self.options = tuple(LayerHeads(*layer) for layer in layers), options
        self.blocks = make_blocks(self.layers, options.scope, pairs)
        self.pairs = tuple((block.layers[0], block.layers[1]) for block in self.blocks if options.scope == "pairs")

        # where each block begins in the flattened states
        self._squares = np.cumsum([0, *(block.extended**2 for block in self.blocks)]).tolist()
        self._widths = np.cumsum([0, *(block.width for block in self.blocks)]).tolist()

        size = self._squares[-1]
        super().__init__(
            {
                "sums": ((options.groups, size), torch.float64),
                "shifted": ((1, size * options.noise_floor), torch.float64),
                "shift": ((self._widths[-1],), torch.float64),
                "images": ((options.groups,), torch.int64),
                "resolution": ((), torch.float64),
            },
            synced=False,
        )
        self._forget()

    @property
    def signature(self) -> tuple[Any, ...]:
        """Layers, compared pairs of layers, and options."""
        return (self.layers, self.pairs, self.options)

    @property
    def option_arrays(self) -> dict[str, NDArray[np.generic]]:
        """Layers int64 `[layers, 3]`, pairs int64 `[pairs, 2]`, and every option by name, `[]`."""
        return {
            "layers": np.asarray(self.layers, dtype=np.int64).reshape(-1, 3),
            "pairs": np.asarray(self.pairs, dtype=np.int64).reshape(-1, 2),
            **{name: np.asarray(value) for name, value in self.options._asdict().items()},
        }

    def empty(self) -> Self:
        """Return the metric of the same layers, blocks and options without images."""
        return type(self)(self.layers, self.options, self.pairs)

    def merge(self, other: Self, group: int | None = None) -> None:
        """Add the sums of other images, about this metric's shift.

        Args:
            other: A metric of the same layers, blocks and options; with `group`, one that has a single group.
            group: The group to add everything to. Without it sums are added group by group.

        Raises:
            ValueError: The other metric has other layers, blocks or options.
        """
        if group is None:
            wanted, rows = self.signature, slice(None)
        else:
            wanted, rows = (self.layers, self.pairs, self.options._replace(groups=1)), slice(group, group + 1)
        self.refuse_unequal(other, wanted)

        for number in range(len(self.blocks)):
            self._merge_block(number, other, rows)
        self._writable("images")[rows] += other.images.to(self.images.device)
        self.resolution = torch.maximum(self.resolution, other.resolution.to(self.resolution.device))

    def from_arrays(self, arrays: Mapping[str, NDArray[np.generic]]) -> Self:
        """Return a new metric of the same layers, blocks and options with the sums that `to_arrays` gave.

        Raises:
            ValueError: The arrays are of another metric (see `SumMetric.from_arrays`).
        """
        metric = super().from_arrays(arrays)
        # a block without samples may still choose its shift; the last entry of extended moments counts samples
        metric._shift_known = [bool(metric._block("sums", n)[:, -1, -1].any()) for n in range(len(metric.blocks))]
        return metric

    def reset(self) -> None:
        """Forget all images."""
        super().reset()
        self._forget()

    def _forget(self) -> None:
        """Forget what is not a state."""
        self._shift_known = [False] * len(self.blocks)

    def _merge_block(self, number: int, other: Self, rows: slice) -> None:
        """Add the other's block to `rows` of this one's, moved to this one's shift."""
        if not other._shift_known[number]:
            return
        theirs = other._shift(number).to(self.shift.device)
        self._set_shift(number, theirs)
        step = self._shift(number) - theirs

        targets = {"sums": rows}
        if self.options.noise_floor:
            targets["shifted"] = slice(None)
        for name, target in targets.items():
            # views of one group each, [extended, extended]
            for mine, row in zip(self._block(name, number)[target], other._block(name, number), strict=True):
                mine += move(row.to(mine.device), step, self.blocks[number])

    def _block(self, name: str, number: int) -> Tensor:
        """Return a view of a block's extended moments, `[groups or 1, extended, extended]`."""
        size = self.blocks[number].extended
        return self._writable(name)[:, self._squares[number] : self._squares[number + 1]].view(-1, size, size)

    def _shift(self, number: int) -> Tensor:
        """Return a view of a block's shift, `[width]`."""
        return self._writable("shift")[self._widths[number] : self._widths[number + 1]]

    def _set_shift(self, number: int, shift: Tensor) -> None:
        """Choose the shift of a block that has no samples yet."""
        if not self._shift_known[number]:
            self._shift(number).copy_(shift)
            self._shift_known[number] = True

    def _writable(self, name: str) -> Tensor:
        """Return a state to change in place.

        A state that was made in inference mode is copied first: outside of that mode it cannot be changed.
        """
        state: Tensor = getattr(self, name)
        if state.is_inference() and not torch.is_inference_mode_enabled():
            state = state.clone()
            setattr(self, name, state)
        return state
