"""From the bytes of an image file to the uint8 pixels that timm's validation would see."""

import io
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from headprobe.errors import UsageError

# Everything Pillow's readers were seen or are documented to raise on damaged files.
PILLOW_ERRORS = (
    OSError,  # truncated, unidentified
    SyntaxError,  # broken PNG
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    NotImplementedError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
LONGEST_ASPECT = 1000  # the resize keeps the aspect: 1 x 100,000 pixels would become 200 x 20,000,000


class ImageError(ValueError):
    """One image that cannot be used; the message is the reason shown to the user."""


class ImageReader:
    """Decodes one image and applies the model's own evaluation transform, pixel for pixel as timm's validate.py does.

    EXIF orientation is not applied and JPEGs are not decoded at reduced size: timm does neither, and both change
    pixels. 16-bit greyscale is scaled to 8 bits (divided by 257), where Pillow's own conversion would clip to white.

    Raises:
        UsageError: The model does not take 1 or 3 channels.
    """

    def __init__(self, data_config: Mapping[str, Any]) -> None:
        from timm.data.transforms_factory import (
            create_transform,
        )  # timm costs seconds to import, `--help` does not need it

        channels, height, width = data_config["input_size"]
        if channels not in (1, 3):
            raise UsageError(f"the model must take 1 (greyscale) or 3 (RGB) channels, got {channels}")
        self.mode = "L" if channels == 1 else "RGB"
        self.shape = (int(channels), int(height), int(width))
        # use_prefetcher ends the transform at uint8; mean and std are applied on the device.
        self.transform = create_transform(**data_config, is_training=False, use_prefetcher=True)

    @property
    def text(self) -> str:
        """The transform in words, for the run's record."""
        return f"{self.mode} {self.transform}"

    def __call__(self, cell: object) -> Tensor:
        """Return uint8 `[channels, height, width]` for the cell of an image column.

        Raises:
            ImageError: The image cannot be used.
        """
        content = image_bytes(cell)
        try:
            with Image.open(io.BytesIO(content)) as image:
                _check_aspect(image)
                pixels = self.transform(_to_mode(image, self.mode))
        except PILLOW_ERRORS as error:
            raise ImageError(_reason(error)) from error
        return torch.as_tensor(pixels)

    def empty(self) -> Tensor:
        """Return uint8 `[0, channels, height, width]`."""
        return torch.empty((0, *self.shape), dtype=torch.uint8)


def image_bytes(cell: object) -> bytes:
    """Return the file content in a cell: bytes, or the hub's `{bytes, path}`.

    Raises:
        ImageError: There is none.
    """
    if isinstance(cell, Mapping):
        cell = cell.get("bytes")
    if cell is None:
        raise ImageError("there is no image in this row")
    if not isinstance(cell, bytes):
        raise ImageError(f"the image column holds a {type(cell).__name__} where the bytes of an image file are needed")
    if not cell:
        raise ImageError("the image file is empty (0 bytes)")
    return cell


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):
        image = _sixteen_to_eight_bits(image)
    return image.convert(mode)


def _sixteen_to_eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)  # "I;16", "I;16B", and "I" from Pillow before 11
    if values.min() < 0 or values.max() > 65535:
        raise ImageError(f"greyscale values must be in 0..65535, got {values.min()}..{values.max()}")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _check_aspect(image: Image.Image) -> None:
    short, long = sorted(image.size)
    if long > LONGEST_ASPECT * short:
        raise ImageError(f"the image is too long to resize: {image.size[0]} x {image.size[1]} pixels")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its own message names a buffer's address
        return "not an image file that Pillow knows"
    return " ".join(str(error).split()) or type(error).__name__
