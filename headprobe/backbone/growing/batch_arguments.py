"""Tensors among a module's arguments: where they are, which carry the batch, and how to change them."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Path = tuple[int | str, ...]
"""Where a tensor is among a module's arguments: a position or keyword, then places in the lists that it may be in."""


Batched = tuple[tuple[Path, int], ...]
"""Arguments that carry the batch, with their rows per image."""


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def shapes(path: Path, value: Any) -> Iterator[tuple[Path, torch.Size]]:
    """Yield the places and shapes of all tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield path, value.shape
    elif type(value) in (tuple, list):
        for key, item in enumerate(value):
            yield from shapes((*path, key), item)
    elif type(value) is dict:
        for key, item in value.items():
            yield from shapes((*path, key), item)


def batched(two: dict[Path, torch.Size], three: dict[Path, torch.Size]) -> Batched:
    """Return the tensor arguments that grow from 2 to 3 images as the batch does, with their rows per image."""
    found = []
    for path, shape in two.items():
        if shape and path in three and 2 * three[path][0] == 3 * shape[0] and shape[0] % 2 == 0:
            found.append((path, shape[0] // 2))
    return tuple(found)


def grown(args: tuple[Any, ...], kwargs: dict[str, Any], arguments: Batched, images: int, copies: int) -> Arguments:
    """Return the arguments with the rows of the first `images` images appended `copies` times where a batch is."""
    return _changed(
        args, kwargs, arguments, lambda tensor, rows: torch.cat([tensor, *[tensor[: images * rows]] * copies])
    )


def first_rows(args: tuple[Any, ...], kwargs: dict[str, Any], arguments: Batched, images: int) -> Arguments:
    """Return the arguments with the rows of the first `images` images only where a batch is."""
    return _changed(args, kwargs, arguments, lambda tensor, rows: tensor[: images * rows])


def _changed(
    args: tuple[Any, ...], kwargs: dict[str, Any], arguments: Batched, change: Callable[[Tensor, int], Tensor]
) -> Arguments:
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
