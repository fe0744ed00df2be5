"""A few images with the attention maps of every head, to look at: which images they are, and how they are kept.

The images are those with the smallest hash of their position in the data, so they are the same for any batch size, any
number of processes and any order. An image that cannot be read is never offered: the next one takes its place.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from headprobe.metrics.token_grid import Size

THUMBNAIL = 112
"""Pixels of a thumbnail's long side, at most."""

Arrays = dict[str, NDArray[np.generic]]


@dataclass
class Example:
    """One image and its maps, before it is an entry of the arrays.

    Attributes:
        maps: By layer, uint8 `[heads, rows, columns]`: 255 is the head's largest weight on this image.
        largest: By layer, float32 `[heads]`, that weight.
        thumbnail: uint8 `[rows, columns, 3]`, None until the image was judged.
        label: Its class in the model's numbering.
        prediction: The whole model's class, -1 where its logits are NaN or infinite.
        source: The file (and the rows in it) that it is from.
    """

    maps: dict[int, Tensor] = field(default_factory=dict)
    largest: dict[int, Tensor] = field(default_factory=dict)
    thumbnail: Tensor | None = None
    label: int = -1
    prediction: int = -1
    source: str = ""


def rank_of(unit: int, row: int) -> int:
    """Return the place of an image in the order in which images are chosen, from its place in the data."""
    return int.from_bytes(hashlib.sha256(f"example:{unit}:{row}".encode()).digest()[:8], "big")


class Examples:
    """The first few images of those that were offered, in the order of `rank_of`, with their maps.

    Args:
        most: How many images to keep.
        shapes: Of each layer's maps `(heads, rows, columns)`, None for a layer without any.
        thumbnail: Rows and columns of thumbnails, in pixels.
    """

    def __init__(self, most: int, shapes: Sequence[tuple[int, int, int] | None], thumbnail: Size) -> None:
        self.most, self.shapes, self.thumbnail = most, tuple(shapes), thumbnail
        self._kept: dict[tuple[int, int, int], Example] = {}  # by rank, unit and row, in this order

    def offer(self, unit: int, rows: Iterable[int]) -> None:
        """Take in those of these images that are among the first, and forget those that no longer are."""
        offered = {(rank_of(unit, row), unit, row) for row in rows}
        self._kept = {key: self._kept.get(key) or Example() for key in sorted({*self._kept, *offered})[: self.most]}

    def of_unit(self, unit: int) -> dict[int, Example]:
        """Return the images of a unit that are kept, by row."""
        return {row: example for (_, own, row), example in self._kept.items() if own == unit}

    def merge(self, other: "Examples") -> None:
        """Take in the images of other units.

        Raises:
            ValueError: They are of another model or other options.
        """
        mine, theirs = ((one.most, one.shapes, one.thumbnail) for one in (self, other))
        if mine != theirs:
            raise ValueError(f"only examples of the same model and options can be merged: {mine} here, got {theirs}")
        both = {**self._kept, **other._kept}
        self._kept = {key: both[key] for key in sorted(both)[: self.most]}

    def to(self, device: Any) -> Self:
        """Move the maps to a device."""
        for example in self._kept.values():
            for by_layer in (example.maps, example.largest):
                by_layer.update({layer: values.to(device) for layer, values in by_layer.items()})
        return self

    def __len__(self) -> int:
        return len(self._kept)

    def _layout(self, images: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return dtype and shape of every array, but for `source`."""
        found: dict[str, tuple[str, tuple[int, ...]]] = {
            "unit": ("int64", (images,)),
            "row": ("int64", (images,)),
            "label": ("int64", (images,)),
            "prediction": ("int64", (images,)),
            "thumbnail": ("uint8", (images, *self.thumbnail, 3)),
        }
        for layer, shape in enumerate(self.shapes):
            if shape is not None:
                found[name_of(layer)] = "uint8", (images, *shape)
                found[name_of(layer) + LARGEST] = "float32", (images, shape[0])
        return found

    def to_arrays(self) -> Arrays:
        """Return everything as arrays, `[images, ...]`; the sources as bytes of JSON.

        Raises:
            ValueError: An image was observed and never judged.
        """
        missing = [(unit, row) for (_, unit, row), example in self._kept.items() if example.thumbnail is None]
        if missing:
            raise ValueError(f"images must be judged before they are stored, got (unit, row) {missing}")
        rows = [_row(unit, row, example) for (_, unit, row), example in self._kept.items()]
        arrays: Arrays = {
            "source": np.frombuffer(json.dumps([one.source for one in self._kept.values()]).encode(), np.uint8)
        }
        for name, (dtype, shape) in self._layout(len(rows)).items():
            arrays[name] = np.array([row[name] for row in rows], dtype=dtype).reshape(shape)
        return arrays

    def from_arrays(self, arrays: Mapping[str, NDArray[np.generic]]) -> Self:
        """Return new examples of the same model and options with what `to_arrays` gave.

        Raises:
            ValueError: An array is missing, unknown, or of another dtype or shape.
        """
        found = type(self)(self.most, self.shapes, self.thumbnail)
        images = int(np.size(arrays.get("unit", ())))
        layout = self._layout(images)
        if arrays.keys() != {"source", *layout} or images > self.most:
            wanted = f"{', '.join(['source', *layout])} of at most {self.most} images"
            raise ValueError(f"the arrays must be {wanted}, got {', '.join(arrays)} of {images}")
        for name, (dtype, shape) in layout.items():
            here = str(arrays[name].dtype), arrays[name].shape
            if here != (dtype, shape):
                raise ValueError(f"array {name!r} must be {dtype} {list(shape)}, got {here[0]} {list(here[1])}")
        sources = json.loads(arrays["source"].tobytes().decode())
        for image, source in zip(range(images), sources, strict=True):
            row = {name: arrays[name][image] for name in layout}
            key = rank_of(int(row["unit"]), int(row["row"])), int(row["unit"]), int(row["row"])
            found._kept[key] = self._example(row, str(source))
        return found

    def _example(self, row: Mapping[str, Any], source: str) -> Example:
        """Return the image of one row of the arrays."""
        own = [layer for layer, shape in enumerate(self.shapes) if shape is not None]
        return Example(
            maps={layer: torch.tensor(row[name_of(layer)]) for layer in own},
            largest={layer: torch.tensor(row[name_of(layer) + LARGEST]) for layer in own},
            thumbnail=torch.tensor(row["thumbnail"]),
            label=int(row["label"]),
            prediction=int(row["prediction"]),
            source=source,
        )


LARGEST = "_max"
"""Ends the names of arrays of largest weights."""


def name_of(layer: int) -> str:
    """Return the name of the array of a layer's maps."""
    return f"layer_{layer:03d}"


def _row(unit: int, row: int, example: Example) -> dict[str, Any]:
    """Return one image's entries of the arrays."""
    found: dict[str, Any] = {"unit": unit, "row": row, "label": example.label, "prediction": example.prediction}
    found["thumbnail"] = None if example.thumbnail is None else example.thumbnail.numpy()
    for layer, values in example.maps.items():
        found |= {name_of(layer): values.cpu().numpy(), name_of(layer) + LARGEST: example.largest[layer].cpu().numpy()}
    return found


def thumbnail_size(size: Size) -> Size:
    """Return rows and columns of the thumbnail of an image with these rows and columns; it is never enlarged."""
    scale = min(1.0, THUMBNAIL / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def thumbnail_of(image: Tensor) -> Tensor:
    """Return an image, uint8 `[channels, rows, columns]`, as its thumbnail `[rows, columns, 3]`."""
    rows, columns = image.shape[1:]
    small = F.interpolate(image[None].cpu(), thumbnail_size((rows, columns)), mode="bilinear", antialias=True)[0]
    return small.expand(3, -1, -1).permute(1, 2, 0).contiguous()
