"""Tensors among a module's arguments: where they are, which carry the batch, and how to change them."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

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


def batched(two: dict[Path, torch.Size], three: dict[Path, torch.Size]) -> Batched:
    """Return the tensor arguments that grow with the batch, with their rows per image.

    Args:
        two: Shapes of a module's arguments in a forward pass of 2 images.
        three: The same for 3 images.
    """
    found = []
    for path, shape in two.items():
        if not shape or path not in three:  # a number has no rows; an argument may be left out
            continue
        rows, left = divmod(shape[0], 2)
        if left == 0 and three[path][0] == 3 * rows:
            found.append((path, rows))
    return tuple(found)


def grown(args: tuple[Any, ...], kwargs: dict[str, Any], arguments: Batched, images: int, copies: int) -> Arguments:
    """Return the arguments with the trunk's rows appended `copies` times to each tensor that carries the batch.

    The trunk's rows are the rows of the first `images` images.
    """

    def longer(tensor: Tensor, rows: int) -> Tensor:
        trunk = tensor[: images * rows]
        return torch.cat([tensor, *[trunk] * copies])

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
