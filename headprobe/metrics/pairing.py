"""Every image beside the next one of its unit: the pairs whose cross moment tells how similar unrelated images look."""

from collections.abc import Hashable
from typing import NamedTuple

from torch import Tensor

from headprobe.errors import UsageError


class Ends(NamedTuple):
    """What is kept of a unit between batches, each ``[tokens, columns]``."""

    first: Tensor
    last: Tensor
    images: int


class NextImage:
    """Sums ``z_i z_(i+1)^T`` over the images of a unit, the last of them paired with the first.

    As the pairs close to a ring, both sides hold the same images, and the cross moment is that of a permutation that
    leaves no image in its place: its means and second moments are the unpaired ones. Samples are paired at the same
    token. All that is carried from batch to batch is the first and the last image of each unit that is still open.
    """

    def __init__(self) -> None:
        self._open: dict[Hashable, Ends] = {}

    def add(self, key: Hashable, rows: Tensor, tokens: int) -> Tensor:
        """Return the cross moment of a batch's rows ``[images * tokens, columns]``, joined to what came before.

        Raises:
            UsageError: An image has other tokens than the one before.
        """
        first, last = rows[:tokens], rows[-tokens:].clone()
        total, images = rows[:-tokens].T @ rows[tokens:], len(rows) // tokens
        before = self._open.get(key)
        if before is None:
            self._open[key] = Ends(first.clone(), last, images)
            return total
        if len(before.last) != tokens:
            rule = "the noise floor pairs images of equal token counts: switch it off, or sample 'class' or 'mean'"
            raise UsageError(f"{rule}, got {tokens} tokens after {len(before.last)}")
        self._open[key] = Ends(before.first, last, before.images + images)
        return total.addmm_(before.last.T, first)

    def close(self, key: Hashable) -> Tensor | None:
        """Return the cross moment of the last image with the first; None for fewer than two images."""
        ends = self._open.pop(key, None)
        return None if ends is None or ends.images < 2 else ends.last.T @ ends.first
