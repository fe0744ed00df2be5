"""Samples on their way into the moments: what a sample of a layer is, and what waits for more of its batch or unit.

Two things wait between calls. A layer waits until the other layers of its block have come (`LayerQueue`), and the first
and last image of a unit wait for the images beside them (`NextImage`).
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from headprobe.errors import RunError, UsageError
from headprobe.metrics.similarity.head_blocks import Block, LayerHeads, Sampling
from headprobe.text import counted


def take_samples(layer: int, outputs: Tensor, shape: LayerHeads, sampling: Sampling) -> Tensor:
    """Return the samples of a layer, `[images, samples, heads, head_dim]`.

    `tokens` are all tokens, `patches` all but the prefix tokens. `class` is the first token and `mean` the mean over
    all tokens, each one sample per image.

    Args:
        layer: Its number, for messages.
        outputs: `[images, tokens, heads, head_dim]`.
        shape: What the layer hands over.
        sampling: What a sample is.

    Raises:
        UsageError: The outputs are not this layer's, or hold no such token.
    """
    wanted = (shape.heads, shape.head_dim)
    if outputs.ndim != 4 or tuple(outputs.shape[2:]) != wanted or not outputs.is_floating_point():
        rule = f"outputs of layer {layer} must be floating point [images, tokens, {wanted[0]}, {wanted[1]}]"
        raise UsageError(f"{rule}, got {outputs.dtype} {list(outputs.shape)}")
    needed = {"tokens": 1, "mean": 1, "class": 1, "patches": shape.prefix_tokens + 1}[sampling]
    if outputs.shape[1] < needed:
        rule = f"layer {layer} has no {sampling} sample: it hands over too few tokens; choose another sampling"
        raise UsageError(f"{rule}, got {counted(outputs.shape[1], 'token')}, {shape.prefix_tokens} of them prefix")

    if sampling == "mean":
        return outputs.mean(dim=1, keepdim=True, dtype=torch.float64)
    return {"tokens": outputs, "patches": outputs[:, shape.prefix_tokens :], "class": outputs[:, :1]}[sampling]


class LayerQueue:
    """Collects the layers of each unit's batch and gives out every block once all its layers are there.

    Args:
        blocks: Which layers belong together.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = blocks
        self.needed = frozenset(layer for block in blocks for layer in block.layers)
        # by unit and layer; None for a layer that came and that no block waits for any more
        self._arrived: dict[Hashable, dict[int, Tensor | None]] = {}

    @property
    def units(self) -> set[Hashable]:
        """Units with a batch that lacks layers."""
        return set(self._arrived)

    def add(self, unit: Hashable, layer: int, samples: Tensor) -> list[tuple[int, list[Tensor]]]:
        """Return the number and samples of every block that this layer completes.

        Raises:
            UsageError: The block's layers differ in images or tokens.
            RunError: The layer came twice before all others came once.
        """
        arrived = self._arrived.setdefault(unit, {})
        if layer in arrived:
            missing = sorted(self.needed - arrived.keys())
            raise RunError(f"every batch sends each layer once: layers {missing} are missing, got layer {layer} again")
        arrived[layer] = samples

        with_layer = [(number, block) for number, block in enumerate(self.blocks) if layer in block.layers]
        complete = [
            (number, _together(block, arrived)) for number, block in with_layer if arrived.keys() >= set(block.layers)
        ]

        # let go of layers that no block waits for, and of the batch once it is whole
        for other in arrived:
            if all(arrived.keys() >= set(block.layers) for block in self.blocks if other in block.layers):
                arrived[other] = None
        if arrived.keys() == self.needed:
            del self._arrived[unit]
        return complete

    def waiting(self, unit: Hashable) -> list[int]:
        """Return the layers that are still missing from the unit's batch."""
        return sorted(self.needed - self._arrived[unit].keys()) if unit in self._arrived else []


def _together(block: Block, arrived: dict[int, Tensor | None]) -> list[Tensor]:
    """Return the samples of a block's layers, which must agree in images and tokens."""
    samples = [tensor for layer in block.layers if (tensor := arrived[layer]) is not None]
    counts = {layer: tuple(part.shape[:2]) for layer, part in zip(block.layers, samples, strict=True)}
    if len(set(counts.values())) > 1:
        rule = "layers of different token counts have no common tokens: compare them by the sampling 'mean'"
        raise UsageError(f"{rule}, got [images, tokens] by layer {counts}")
    return samples


class Ends(NamedTuple):
    """What is kept of a unit between batches: its first and last image, each `[tokens, columns]`."""

    first: Tensor
    last: Tensor
    images: int


class NextImage:
    """Pairs each image of a unit with the next one, the last of them with the first, across the batches of the unit.

    The cross moment `sum z_i z_(i+1)^T` measures how similar unrelated images look. As the pairs close to a
    ring, both sides hold the same images, and the cross moment is one of a permutation that leaves no image in its
    place: its means and second moments are the unpaired ones. Samples are paired at the same token. All that is
    carried from batch to batch is the first and the last image of each unit that is still open.
    """

    def __init__(self) -> None:
        self._ends: dict[tuple[Hashable, int], Ends] = {}

    @property
    def units(self) -> set[Hashable]:
        """Units with images that are not closed to a ring."""
        return {unit for unit, _ in self._ends}

    def join(self, unit: Hashable, block: int, rows: Tensor, tokens: int) -> Tensor | None:
        """Keep the ends of a batch, and return the unit's image before it, `[tokens, columns]`; None if there is none.

        Args:
            unit: The unit that the images belong to.
            block: Number of the block of heads.
            rows: `[images * tokens, columns]`.
            tokens: Tokens of each image.

        Raises:
            UsageError: An image has other tokens than the one before.
        """
        last, images = rows[-tokens:].clone(), len(rows) // tokens
        before = self._ends.get((unit, block))
        if before is None:
            self._ends[unit, block] = Ends(rows[:tokens].clone(), last, images)
            return None
        if len(before.last) != tokens:
            rule = "the noise floor pairs images of equal token counts: switch it off, or sample 'class' or 'mean'"
            raise UsageError(f"{rule}, got {counted(tokens, 'token')} after {len(before.last)}")
        self._ends[unit, block] = Ends(before.first, last, before.images + images)
        return before.last

    def close(self, unit: Hashable, block: int) -> Ends | None:
        """Return the first and the last image, which close the ring; None for fewer than two images."""
        ends = self._ends.pop((unit, block), None)
        return None if ends is None or ends.images < 2 else ends
