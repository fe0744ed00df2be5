"""Donors of the ablation `resample`: whose heads fill the masked slots of an image.

The rows that a unit gives are cut into groups of four neighbours; a single row left over joins the last group. In a
group every image takes the heads of another one, by a hash of the draw, the unit and the row. So donors are the same
for any batch size, row budget and number of processes, and a forward pass needs whole groups only.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headprobe.errors import RunError
from headprobe.text import Decision, counted, ranges

GROUP = 4
"""Neighbouring rows of a unit that are each other's donors."""

MANY_OF_ONE_CLASS = 0.2
"""Share of donors of their image's own class above which a run says so before its table."""


@dataclass(frozen=True)
class DonorGroups:
    """The images of a batch in groups, inside which they are each other's donors.

    Attributes:
        unit: The unit that they belong to.
        rows: For every group the rows of its images in the unit, in the order of the batch.
    """

    unit: int
    rows: tuple[tuple[int, ...], ...]

    def of_pass(self, first: int, most: int) -> slice:
        """Return the images of the next forward pass: whole groups, at least one, from image `first` on.

        Args:
            first: The first image of a group.
            most: Images that the pass may have; a group that is larger comes all the same.
        """
        start, stop = 0, first  # of a group, and of the pass
        for group in self.rows:
            end = start + len(group)
            if start >= first:
                if stop > first and end - first > most:
                    break
                stop = end
            start = end
        return slice(first, stop)

    def donors(self, seed: int, draw: int) -> Tensor:
        """Return for each image of the batch the place of its donor in the batch, int64 `[images]`.

        In each group it is the next in the order of a hash: one cycle through all of them, so nobody is its own donor.
        """
        places: list[int] = []
        for group in self.rows:
            hashes = [_hash(seed, draw, self.unit, row) for row in group]
            order = sorted(range(len(group)), key=hashes.__getitem__)
            first = len(places)
            own = [0] * len(group)
            for place, following in zip(order, [*order[1:], order[0]], strict=True):
                own[place] = first + following
            places += own
        return torch.tensor(places, dtype=torch.int64)


def donor_groups(
    unit: int,
    rows: Sequence[int],
    bad: Mapping[int, str] | None = None,
    *,
    last: bool = True,
    wanted: Sequence[int] | None = None,
    name: str = "",
) -> DonorGroups:
    """Return the groups of a batch. Rows that cannot be read have a place in their group, and are nobody's donor.

    Args:
        unit: The unit that the batch belongs to.
        rows: Rows of its images in the unit, ascending.
        bad: What is wrong with its other rows, by row.
        last: Whether this is the unit's last batch.
        wanted: All rows that the unit gives, ascending; None where they are all from 0 on.
        name: The unit's name in messages.

    Raises:
        RunError: An image has no donor, or the batch does not hold whole groups.
    """
    bad, name = bad or {}, name or f"unit {unit}"
    places = {row: row if wanted is None else bisect_left(wanted, row) for row in sorted([*rows, *bad])}
    found: dict[int, list[int]] = {}
    for row, place in places.items():
        found.setdefault(place // GROUP, []).append(row)
    groups = list(found.values())
    if last and len(groups) > 1 and len(groups[-1]) == 1:
        left_over = groups.pop()
        groups[-1] += left_over

    if last and list(places.values()) == [0]:
        raise RunError(no_donor(name))
    whole = groups[:-1] if last else groups
    if any(len(group) < GROUP for group in whole) or any(len(group) == 1 for group in groups):
        raise RunError(
            f"the ablation resample needs batches of whole groups of {GROUP} rows, cut by headprobe.ProbeTrainer and "
            f"ImageNetDataModule, got rows {ranges(sorted(places))} of {name}"
        )
    images = set(rows)
    readable = [tuple(row for row in group if row in images) for group in groups]
    for group, left in zip(groups, readable, strict=True):
        if len(left) == 1:
            lost = next(row for row in group if row in bad)
            raise RunError(
                f"the ablation resample has no donor for row {left[0]} of {name}: no other of the rows {ranges(group)} "
                f"can be read (row {lost}: {bad[lost]}); mend these images or leave resample out, got "
                f"{counted(1, 'image')} in the group"
            )
    return DonorGroups(unit, tuple(group for group in readable if group))


def no_donor(name: str) -> str:
    """Return the message about a unit with a single row."""
    return (
        f"the ablation resample needs another image of the same unit as donor, and {name} gives one row only: take "
        "more images (--data.max_images), larger units (--data.unit file), or leave resample out, got 1 row"
    )


def donors_in_words(share: float | None) -> Decision:
    """Return where resampled heads come from and, once it is counted, how many donors take little away.

    Args:
        share: Share of rows whose donor is of the image's own class; None where it is not counted.
    """
    text = f"heads of another image among {GROUP} neighbouring rows of a unit"
    if share is None:
        return Decision("resample", text)
    many = share > MANY_OF_ONE_CLASS
    text += f"; donors are of the image's own class in {share:.0%} of rows"
    if many:
        text += ", as in data sorted by class: drops are understated"
    return Decision("resample", text, shown=many)


def _hash(seed: int, draw: int, unit: int, row: int) -> bytes:
    return hashlib.sha256(f"resample:{seed}:{draw}:{unit}:{row}".encode()).digest()
