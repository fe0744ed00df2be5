"""From the bytes of an image file to the uint8 pixels that timm's validation would see."""

import io
import logging
import struct
import warnings
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from headprobe.data.sources.source import MOST_BYTES, Unreadable
from headprobe.errors import UsageError

# What image datasets hold, all decoded inside this process. Pillow knows more: its readers of EPS and others start
# external programs (Ghostscript), and every further one is code that meets unknown bytes.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


# Everything that Pillow's readers raise on damaged files, by their documentation or in our tests.
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


# Pillow takes up to twice as many with a warning: at 4 bytes per pixel and one copy for the conversion that would be
# 1.4 GB in every worker. ImageNet's largest image has 61 million.
MOST_PIXELS = 89_478_485
LONGEST_ASPECT = 1000  # the resize keeps the aspect: 1 x 100,000 pixels would become 200 x 20,000,000


# Every scan of a progressive JPEG passes over the whole image and may have 20 bytes; encoders write about 10 scans.
MOST_SCANS = 500
WORTH_COUNTING = 2**38  # pixels times bytes: 500 x 500 pixels in 1 MB


logging.getLogger("PIL").addHandler(logging.NullHandler())  # else its errors reach the terminal, without a file's name


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
        # timm costs seconds to import, and `--help` does not need it.
        from timm.data.transforms_factory import create_transform

        channels, height, width = data_config["input_size"]
        if channels not in (1, 3):
            raise UsageError(f"the model must take 1 (greyscale) or 3 (RGB) channels, got {channels}")
        self.mode = "L" if channels == 1 else "RGB"
        self.shape = (int(channels), int(height), int(width))

        # use_prefetcher ends the transform at uint8; mean and std are applied on the device.
        self.transform = create_transform(**data_config, is_training=False, use_prefetcher=True)

        # The resize takes the shorter side to so many pixels; the whole must not have more than MOST_PIXELS then.
        shorter_side = max(height, width) / (data_config.get("crop_pct") or 1)
        self._longest_aspect = min(LONGEST_ASPECT, MOST_PIXELS / shorter_side**2)

    @property
    def text(self) -> str:
        """The transform as text, for the run's key."""
        return f"{self.mode} {self.transform}"

    def __call__(self, cell: object) -> Tensor:
        """Return uint8 `[channels, height, width]` for the cell of an image column.

        Raises:
            ImageError: The image cannot be used.
        """
        content = image_bytes(cell)
        try:
            # Pillow warns about damage that it tolerates (EXIF, palettes), once for each text: too much for a terminal.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return torch.as_tensor(self._pixels(content))
        except PILLOW_ERRORS as error:
            raise ImageError(_reason(error)) from error

    def _pixels(self, content: bytes) -> Any:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            _check_size(image, self._longest_aspect)
            _check_scans(image, content)
            # Converting to the mode that an image has already would copy it.
            return self.transform(image if image.mode == self.mode else _to_mode(image, self.mode))

    def empty(self) -> Tensor:
        """Return uint8 `[0, channels, height, width]`."""
        return torch.empty((0, *self.shape), dtype=torch.uint8)


def image_bytes(cell: object) -> bytes:
    """Return the file content in a cell: bytes, or the hub's `{bytes, path}`.

    A path without bytes is not followed: it could name any file of this machine.

    Raises:
        ImageError: There is none, or more than the limit of 256 MiB.
    """
    if isinstance(cell, Unreadable):
        raise ImageError(cell.reason)
    if isinstance(cell, Mapping):
        if cell.get("bytes") is None and cell.get("path") is not None:
            raise ImageError(f"there is no image in this row, only a path, which is not followed: {cell['path']}")
        cell = cell.get("bytes")
    if cell is None:
        raise ImageError("there is no image in this row")
    if not isinstance(cell, bytes):
        raise ImageError(f"the image column holds a {type(cell).__name__} where the bytes of an image file are needed")
    if not cell:
        raise ImageError("the image file is empty (0 bytes)")
    if len(cell) > MOST_BYTES:
        raise ImageError(f"an image file may have at most {MOST_BYTES:,} bytes, and this one has more")
    return cell


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image to `L` or `RGB`, or refuse one with pixels of no known range."""
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        kind = "floating-point" if image.mode == "F" else "signed or 32-bit"
        raise ImageError(f"nothing says which {kind} numbers are black and white in this image")
    if image.mode.startswith("I"):
        image = _sixteen_to_eight_bits(image)
    return image.convert(mode)


def _sixteen_to_eight_bits(image: Image.Image) -> Image.Image:
    """Divide by 257, which takes 65535 to 255, and round."""
    values = np.array(image, dtype=np.int32)  # "I;16", "I;16B", and "I" of PPM and of PNG before Pillow 11
    values += 128
    values //= 257
    return Image.fromarray(values.astype(np.uint8))


def _check_scans(image: Image.Image, content: bytes) -> None:
    width, height = image.size
    # Counting scans takes 4% of an ordinary image's time. A small image is soon decoded, however many scans it has.
    if not content.startswith(b"\xff\xd8") or width * height * len(content) < WORTH_COUNTING:
        return
    scans = content.count(b"\xff\xda")
    if scans > MOST_SCANS:
        raise ImageError(f"a JPEG may have at most {MOST_SCANS} scans, got {scans}")


def _check_size(image: Image.Image, longest_aspect: float) -> None:
    width, height = image.size
    if width * height > MOST_PIXELS:
        raise ImageError(f"an image may have at most {MOST_PIXELS:,} pixels, got {width} x {height}")
    if max(width, height) > longest_aspect * min(width, height):
        raise ImageError(f"the image is too long to resize: {width} x {height} pixels")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its own message holds the address of a buffer
        return f"not an image file of a kind that is read here ({', '.join(FORMATS)})"
    return " ".join(str(error).split()) or type(error).__name__
