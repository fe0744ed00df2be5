"""The row plan: which images and masks share a forward pass, and what every row of it is.

A forward pass takes `images` images. Its rows are the *trunk* (the unmasked images), then as many rows for every mask,
in the order in which the masks join (section "growing pass" of docs/how_it_works.md). Masks that do not fit together
are spread over waves; every wave runs its own trunk. Nothing else decides the order of rows.
Below: the rows of the pass under way, and how a module's arguments get more or fewer of them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from headprobe.errors import UsageError

ROW_BUDGET_CPU, ROW_BUDGET_GPU = 48, 1024
"""Rows that share a forward pass unless the user says otherwise.

On CPUs: DeiT-Ti's largest activation of more than 54 rows is above 32 MiB, and C libraries take such memory anew from
the system each time, page by page. 37 rows took 0.92 of the time of 74 (benchmarks/README.md).
"""


@dataclass(frozen=True)
class RowPlan:
    """How the rows of every forward pass are laid out.

    Attributes:
        batch_size: Images of a batch.
        images: Images per forward pass (the last pass of a batch may have fewer).
        waves: For every wave the numbers of its masks (from 0) in the order in which they join.
        idle: Masks without rows: they mask no head, and have the baseline's logits, or are the same as another.
        budget: Rows that the end of a forward pass may have.
        together: Images come in groups of so many, which must share a forward pass; the last one may have one more.
    """

    batch_size: int
    images: int
    waves: tuple[tuple[int, ...], ...]
    idle: tuple[int, ...]
    budget: int
    together: int = 1

    @classmethod
    def build(cls, ordered: Sequence[int], masks: int, batch_size: int, budget: int, together: int = 1) -> "RowPlan":
        """Plan the forward passes.

        Args:
            ordered: The masks with rows of their own; neighbours come into the same wave.
            masks: Number of all masks.
            batch_size: Images of a batch.
            budget: Rows that fit into one forward pass, the trunk's included.
            together: Images that must share a forward pass; `images` is a multiple of it.

        Raises:
            UsageError: The budget or the batch size is below 1, or too small for one group of images under one mask.
        """
        if batch_size < 1 or budget < 1:
            raise UsageError(f"batch size and row budget must be 1 or more, got {batch_size} and {budget}")
        least = largest_group(together)
        _refuse_too_few(batch_size, budget, together, least * (1 + bool(ordered)))
        per_wave = max(1, budget // least - 1)
        count = math.ceil(len(ordered) / per_wave)
        waves = tuple(
            tuple(ordered[_share(len(ordered), count, i) : _share(len(ordered), count, i + 1)]) for i in range(count)
        )
        widest = 1 + max((len(wave) for wave in waves), default=0)
        images = max(1, min(batch_size, budget // widest))
        return cls(
            batch_size=batch_size,
            images=images // together * together,
            waves=waves or ((),),
            idle=tuple(sorted(set(range(masks)) - set(ordered))),
            budget=budget,
            together=together,
        )

    @property
    def most_images(self) -> int:
        """Images of the largest forward pass; only a pass of a single group can have one more than `images`."""
        return max(self.images, largest_group(self.together))

    @property
    def most_rows(self) -> int:
        """Rows at the end of the largest forward pass."""
        return self.most_images * (1 + max(len(wave) for wave in self.waves))

    @property
    def least_rows(self) -> int:
        """Rows of the smallest forward pass that any plan of these masks needs."""
        return largest_group(self.together) * (1 + any(self.waves))

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain data, for a run's key and record."""
        return {
            "batch_size": self.batch_size,
            "images": self.images,
            "waves": [list(wave) for wave in self.waves],
            "idle": list(self.idle),
            "budget": self.budget,
            "together": self.together,
        }


def largest_group(together: int) -> int:
    """Return the images of the largest group: a single image left over joins another group."""
    return together + (together > 1)


def _refuse_too_few(batch_size: int, budget: int, together: int, rows: int) -> None:
    """Refuse plans that could not hold one group of images, of which each needs the others."""
    if together > 1 and batch_size < together:
        raise UsageError(
            f"the ablation resample needs batches of {together} images or more, whose donors are each other: choose "
            f"--data.batch_size {together} or a multiple of it, got {batch_size}"
        )
    if together > 1 and budget < rows:
        raise UsageError(
            f"the ablation resample needs {rows} rows in a forward pass, up to {largest_group(together)} images that "
            f"are each other's donors under one mask: choose --model.row_budget {rows} or more, got {budget}"
        )


def _share(items: int, parts: int, part: int) -> int:
    """Return where share number `part` of `items` begins when `parts` shares are as equal as can be."""
    return items * part // parts


@dataclass(frozen=True)
class Wave:
    """The variants that share a forward pass, in the order in which they join.

    Attributes:
        variants: Their numbers.
        keep: Which heads the trunk and each of them keep, bool `[1 + variants, layers, max heads]`.
        layers: The layer at whose join each joins.
        copied: For each the place of the rows that it begins as a copy of: 0 is the trunk, 1 the first variant.
    """

    variants: tuple[int, ...] = ()
    keep: Tensor = field(default_factory=lambda: torch.ones(1, 1, 1, dtype=torch.bool))
    layers: tuple[int, ...] = ()
    copied: tuple[int, ...] = ()


@dataclass
class PassRows:
    """What the rows of the forward pass under way are; the growing pass owns it, and its hooks change it.

    Attributes:
        images: Images of the trunk.
        wave: The variants.
        whole: No shortcut may be taken.
        joined: How many of the wave have joined.
        joining: How many of them joined at the last join, and are nothing but copies since.
        left_out: How many of these are left out for the moment.
        filled: How many of the last variants' slots have been filled already in the layer under way.
        stream: What the last block was given, until its attention has taken it, `[rows, tokens, dim]`.
    """

    images: int = 0
    wave: Wave = field(default_factory=Wave)
    whole: bool = False
    joined: int = 0
    joining: int = 0
    left_out: int = 0
    filled: int = 0
    stream: Tensor | None = None

    def begin(self, images: int, wave: Wave, whole: bool) -> None:
        """Begin a forward pass; nobody has joined."""
        self.images, self.wave, self.whole = images, wave, whole
        self.joined = self.joining = self.left_out = self.filled = 0
        self.stream = None


# -- tensors among a module's arguments --------------------------------------------------------------------------------


Path = tuple[int | str, ...]
"""Where a tensor is among a module's arguments: its position or keyword, then its index in each list around it."""


Batched = tuple[tuple[Path, int], ...]
"""Arguments that carry the batch, with their rows per image."""


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def shapes(path: Path, value: Any) -> Iterator[tuple[Path, torch.Size]]:
    """Yield the path and shape of every tensor in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield path, value.shape
    elif type(value) in (tuple, list):
        for key, item in enumerate(value):
            yield from shapes((*path, key), item)
    elif type(value) is dict:
        for key, item in value.items():
            yield from shapes((*path, key), item)


def batched(few: dict[Path, torch.Size], many: dict[Path, torch.Size]) -> Batched:
    """Return the tensor arguments that grow with the batch, with their rows per image.

    Args:
        few: Shapes of a module's arguments in a forward pass of 2 images.
        many: The same for 4 images.
    """
    found = []
    for path, shape in few.items():
        if not shape or path not in many:  # a number has no rows; an argument may be left out
            continue
        rows, left = divmod(shape[0], 2)
        if left == 0 and many[path][0] == 4 * rows:
            found.append((path, rows))
    return tuple(found)


def grown(
    args: tuple[Any, ...], kwargs: dict[str, Any], arguments: Batched, images: int, copied: Sequence[int]
) -> Arguments:
    """Return the arguments with copies of rows appended to each tensor that carries the batch.

    Args:
        args: Positional arguments of a module.
        kwargs: Its named ones.
        arguments: Those that carry the batch.
        images: Images of a variant's rows.
        copied: For each copy the place of its rows; the trunk's, 0, are the first `images` images.
    """

    def longer(tensor: Tensor, rows: int) -> Tensor:
        share = images * rows
        return torch.cat([tensor, *(tensor[place * share : (place + 1) * share] for place in copied)])

    return _changed(args, kwargs, arguments, longer)


def first_rows(args: tuple[Any, ...], kwargs: dict[str, Any], arguments: Batched, images: int) -> Arguments:
    """Return the arguments with only the rows of the first `images` images in each tensor that carries the batch."""
    return _changed(args, kwargs, arguments, lambda tensor, rows: tensor[: images * rows])


def _changed(
    args: tuple[Any, ...], kwargs: dict[str, Any], arguments: Batched, change: Callable[[Tensor, int], Tensor]
) -> Arguments:
    """Return the arguments with every tensor that carries the batch changed; `change` takes its rows per image too."""
    positional: Any = args
    named: Any = kwargs
    for path, rows in arguments:

        def of(tensor: Tensor, rows: int = rows) -> Tensor:
            return change(tensor, rows)

        if isinstance(path[0], int):
            positional = _replaced(positional, path, of)
        else:
            named = _replaced(named, path, of)
    return positional, named


def _replaced(holder: Any, path: Path, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a copy of nested tuples, lists and dictionaries with the tensor at `path` changed."""
    if not path:
        return change(holder)
    key, *rest = path
    if isinstance(holder, dict):
        return {**holder, key: _replaced(holder[key], tuple(rest), change)}
    items = list(holder)
    items[int(key)] = _replaced(items[int(key)], tuple(rest), change)
    return type(holder)(items)
