"""Moments of head outputs, streamed: float64 sums over samples, from which all similarities of heads follow."""

from collections.abc import Hashable, Iterator, Sequence
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headprobe.errors import RunError, UsageError
from headprobe.metrics.similarity.extended_moments import add_cross, extend, gram, move
from headprobe.metrics.similarity.head_blocks import LayerHeads, MomentOptions
from headprobe.metrics.similarity.head_moments import HeadMoments, take_apart, without_earlier_heads
from headprobe.metrics.similarity.layer_samples import LayerQueue, NextImage, take_samples
from headprobe.metrics.similarity.moment_states import MomentStates
from headprobe.metrics.similarity.whitened_products import WORTHWHILE, WhiteSamples

__all__ = ["LayerHeads", "MomentOptions", "Moments"]

SAMPLES_AT_ONCE = 4096  # multiplied in one product: bounds the scratch memory, and the length of a float32 sum


class Moments(MomentStates):
    """Sums over the head outputs of a model, streamed layer by layer; memory is fixed in the number of images.

    The caller hands over each layer of a batch once, with the unit that its images belong to, and closes the unit
    after its last batch. Images of a unit must come in their order; units may interleave. Results do not depend on the
    batch size.

    Some sums wait for more of a unit: layers wait for the others of their block, and for the noise floor the first and
    the last image of a unit wait for their neighbours until it is closed. While one waits, `merge`, `to_arrays` and
    `compute` refuse.

    Sums are taken about a shift, each channel's mean over the first batch, so a mean far above the deviation costs
    no precision. Products and sums are float64, those of the noise floor too. `precision="float32"` multiplies 4,096
    samples at a time in float32, as precisely as torch is set to, and adds the products up in float64. The samples are
    made white before, so that float32 keeps the small directions of a head as well as its large ones (see
    `whitened_products`); that pays for blocks of six heads and more, and others are multiplied in float64. With one
    sample per image all is float64.

    Args:
        layers: Every attention layer's heads, channels and prefix tokens.
        options: What is summed.
        pairs: Pairs of layers, for the scope `pairs`.

    Raises:
        UsageError: Options outside their choices, jackknife groups with another scope than `within`, or class
            tokens of a layer that has none.
    """

    def __init__(
        self,
        layers: Sequence[LayerHeads],
        options: MomentOptions | None = None,
        pairs: Sequence[tuple[int, int]] = (),
    ) -> None:
        super().__init__(layers, options or MomentOptions(), pairs)
        without = [layer for layer in sorted(self.needed) if not self.layers[layer].prefix_tokens]
        if self.options.sampling == "class" and without:
            raise UsageError(f"layers {without} have no class token: sample 'tokens' or 'mean', got sampling 'class'")

    @property
    def needed(self) -> frozenset[int]:
        """Layers that the blocks are made of; others are ignored."""
        return self._queue.needed

    def update(self, layer: int, outputs: Tensor, unit: Hashable = 0, group: int = 0) -> None:
        """Add one layer's outputs of a batch.

        A layer that waits for others of its block (scopes `all` and `pairs`) is kept until they come.

        Args:
            layer: Its number.
            outputs: `[images, tokens, heads, head_dim]`, images in the unit's order.
            unit: The unit that the images belong to.
            group: The jackknife group that they belong to.

        Raises:
            UsageError: No such layer or group, a wrong shape, or layers of different token counts in one block.
            RunError: A layer came twice before all others came once.
        """
        for what, number, count in (("layer", layer, len(self.layers)), ("group", group, self.options.groups)):
            if not 0 <= number < count:
                raise UsageError(f"the {what} must be in 0 to {count - 1}, got {number}")
        if layer not in self.needed or not len(outputs):
            return

        samples = take_samples(layer, outputs.detach(), self.layers[layer], self.options.sampling)
        for number, parts in self._queue.add(unit, layer, samples):
            self._add_block(number, parts, unit, group)

        self.resolution = self.resolution.clamp(min=torch.finfo(outputs.dtype).eps)
        if layer == min(self.needed):  # every needed layer comes once per batch: one of them counts the images
            self._writable("images")[group] += len(outputs)

    def close(self, unit: Hashable = 0) -> None:
        """End a unit after its last batch; a unit without images may be closed too.

        Raises:
            RunError: A layer of its last batch is missing.
        """
        if missing := self._queue.waiting(unit):
            raise RunError(f"unit {unit} ended before its last batch was whole, got all but layers {missing}")
        with torch.autocast(self.sums.device.type, enabled=False):
            for number in range(len(self.blocks)):
                ends = self._next.close(unit, number)
                if ends is not None:
                    add_cross(self._block("shifted", number)[0], ends.last, ends.first, self.blocks[number])

    def merge(self, other: Self, group: int | None = None) -> None:
        """Add the sums of other images (see `MomentStates.merge`).

        Raises:
            ValueError: The other metric has other layers, blocks or options.
            RunError: A unit is incomplete in one of them.
        """
        self._refuse_incomplete()
        other._refuse_incomplete()
        super().merge(other, group)

    def to_arrays(self) -> dict[str, NDArray[np.generic]]:
        """Return copies of all states by name, with the layers and options.

        Raises:
            RunError: A unit is incomplete.
        """
        self._refuse_incomplete()
        return super().to_arrays()

    def compute(self) -> list[HeadMoments]:
        """Return the centred moments of each block over all images.

        Raises:
            RunError: A unit is incomplete.
        """
        return [self.of_block(number) for number in range(len(self.blocks))]

    def of_block(self, number: int) -> HeadMoments:
        """Return the centred moments of one block over all images: one after the other they need less memory.

        Raises:
            RunError: A unit is incomplete.
        """
        self._refuse_incomplete()
        return self._centred(number, list(range(self.options.groups)), self.options.noise_floor)

    def left_out(self, number: int) -> Iterator[HeadMoments]:
        """Yield the moments of block `number` with one group of images left out at a time, without noise floor.

        Groups without an image do not count; fewer than two groups yield nothing.

        Raises:
            RunError: A unit is incomplete.
        """
        self._refuse_incomplete()
        filled = self.images.nonzero().flatten().tolist()
        for group in filled if len(filled) > 1 else ():
            yield self._centred(number, [other for other in filled if other != group], False)

    def _refuse_incomplete(self) -> None:
        """Refuse to look at sums that wait for more of a unit."""
        waiting = self._queue.units | self._next.units
        if waiting:
            raise RunError(f"moments are complete only between units: close them first, got {sorted(waiting, key=str)}")

    def _forget(self) -> None:
        super()._forget()
        self._queue, self._next = LayerQueue(self.blocks), NextImage()

    def _add_block(self, number: int, parts: list[Tensor], unit: Hashable, group: int) -> None:
        """Add the samples `[images, tokens, heads, head_dim]` of a block's layers."""
        block, (images, tokens) = self.blocks[number], parts[0].shape[:2]
        if not self._shift_known[number]:
            self._set_shift(number, _batch_mean(parts))
        shift, sums = self._shift(number), self._block("sums", number)[group]

        images_at_once = max(1, SAMPLES_AT_ONCE // tokens)
        with torch.autocast(parts[0].device.type, enabled=False):
            for start in range(0, images, images_at_once):
                chunk = [part[start : start + images_at_once] for part in parts]
                rows = extend(chunk, block, shift)  # [images * tokens, extended]
                white = WhiteSamples(rows, block) if self._in_float32(number) else None
                sums += gram(rows, block.width) if white is None else white.own()
                if self.options.noise_floor:
                    shifted = self._block("shifted", number)[0]
                    if white is None:
                        add_cross(shifted, rows[:-tokens], rows[tokens:], block)
                    else:
                        shifted += white.shifted(tokens)
                    before = self._next.join(unit, number, rows, tokens)
                    if before is not None:
                        add_cross(shifted, before, rows[:tokens], block)

    def _in_float32(self, number: int) -> bool:
        """Return whether a block's samples are multiplied in float32."""
        return self.options.products == torch.float32 and self.blocks[number].heads >= WORTHWHILE

    def _centred(self, number: int, groups: list[int], noise_floor: bool) -> HeadMoments:
        """Return the moments of some groups of images, moved from the shift to their mean."""
        block, sums = self.blocks[number], self._block("sums", number)[groups].sum(dim=0)
        count = sums[-1, -1].clamp(min=1)
        step = sums[: block.width, -1] / count  # sum of x over n: the mean about the shift
        centred = move(sums, step, block)
        shifted = None
        if noise_floor:
            moved = move(self._block("shifted", number)[0], step, block).cpu().numpy()
            shifted = without_earlier_heads(take_apart(moved, block.width), block.dims)

        layer, head = block.axes
        return HeadMoments(
            layer=layer,
            head=head,
            dims=block.dims,
            sampling=self.options.sampling,
            images=int(self.images[groups].sum()),
            mean=(self._shift(number) + step).cpu().numpy(),
            offset=step.cpu().numpy(),
            norms=centred[block.width : -1, -1].cpu().numpy(),
            # rounding in `move` may leave it not quite symmetric
            own=take_apart((centred + centred.T).cpu().numpy() / 2, block.width),
            shifted=shifted,
            resolution=float(self.resolution),
            rounding=torch.finfo(torch.float32).eps if self._in_float32(number) else 0.0,
        )


def _batch_mean(parts: list[Tensor]) -> Tensor:
    """Return the mean of each channel, `[width]`, rounded so that subtracting it from float32 loses nothing near it."""
    means = torch.cat([part.double().mean(dim=(0, 1)).flatten() for part in parts])
    return means.float().double().nan_to_num(0.0, 0.0, 0.0)
