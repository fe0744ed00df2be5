import io
import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform

from headprobe.data.decode import ImageError, ImageReader
from headprobe.errors import UsageError
from tests.data.parquet_sets import DATA_CONFIG, encoded

MODES = ["RGB", "L", "LA", "P", "RGBA", "1", "CMYK"]


@pytest.fixture(scope="module")
def reader() -> ImageReader:
    return ImageReader(DATA_CONFIG)


def noise(mode: str = "RGB", size: tuple[int, int] = (37, 23), seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def by_timm(content: bytes, mode: str = "RGB") -> torch.Tensor:
    """Return what timm's validation without its prefetcher would feed the model (ImageDataset opens like this)."""
    image = Image.open(io.BytesIO(content)).convert(mode)
    return create_transform(**DATA_CONFIG, is_training=False)(image)


def by_us(reader: ImageReader, content: bytes) -> torch.Tensor:
    mean, std = (torch.tensor(DATA_CONFIG[key]).view(3, 1, 1) for key in ("mean", "std"))
    return reader(content).float().div(255).sub(mean).div(std)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(37, 23), (1, 1), (16, 16), (300, 5)])
def test_pixels_equal_timms_float_transform_bit_for_bit(reader: ImageReader, mode: str, size: tuple[int, int]) -> None:
    content = encoded(noise(mode, size), "jpeg" if mode == "CMYK" else "png")
    assert torch.equal(by_us(reader, content), by_timm(content))


def test_jpeg_pixels_equal_timms_also_with_an_orientation_tag(reader: ImageReader) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees, which timm does not undo
    content = encoded(noise(), "jpeg", exif=exif)
    assert torch.equal(by_us(reader, content), by_timm(content))


@pytest.mark.parametrize("order", ["little", "big"])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(reader: ImageReader, order: str) -> None:
    eight = np.asarray(noise("L"))
    sixteen = (eight.astype(np.uint16) * 257).astype("<u2" if order == "little" else ">u2")
    image = Image.fromarray(sixteen)
    content = encoded(image, "png" if order == "little" else "tiff")
    assert torch.equal(reader(content), reader(encoded(Image.fromarray(eight))))


def test_a_greyscale_model_gets_one_channel() -> None:
    grey = ImageReader(DATA_CONFIG | {"input_size": (1, 16, 16)})
    content = encoded(noise("RGB", (16, 14)))
    assert grey(content).shape == grey.empty().shape[1:] == (1, 16, 16)


@pytest.mark.parametrize("channels", [2, 4])
def test_other_numbers_of_channels_are_refused(channels: int) -> None:
    with pytest.raises(UsageError, match=rf"1 \(greyscale\) or 3 \(RGB\) channels, got {channels}"):
        ImageReader(DATA_CONFIG | {"input_size": (channels, 16, 16)})


def test_a_cell_may_be_bytes_or_the_hubs_struct(reader: ImageReader) -> None:
    content = encoded(noise())
    assert torch.equal(reader(content), reader({"bytes": content, "path": "a.png"}))


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        (None, "no image in this row"),
        ({"bytes": None, "path": "gone.jpg"}, "no image in this row"),
        (b"", "empty"),
        (b"<!DOCTYPE html>", "not an image file"),
        ("text", "holds a str"),
        (encoded(noise(size=(1, 2000))), "too long to resize: 1 x 2000"),
        (encoded(noise())[:-900], "truncated"),
    ],
)
def test_an_unusable_image_gives_a_reason(reader: ImageReader, cell: object, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        reader(cell)


def test_a_decompression_bomb_is_refused(reader: ImageReader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match="exceeds limit"):
        reader(encoded(noise()))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.*", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "bmp", "webp", "tiff", "ppm"])
def test_damaged_bytes_never_raise_anything_else(reader: ImageReader, kind: str) -> None:
    whole = encoded(noise("RGB"), kind)
    draw = random.Random(0)
    for _ in range(150):
        content = bytearray(whole[: draw.randrange(1, len(whole) + 1)])
        for _ in range(draw.randrange(6)):
            content[draw.randrange(min(len(content), 200))] = draw.randrange(256)
        outcome: Any
        try:
            outcome = reader(bytes(content)).shape
        except ImageError as error:
            outcome = str(error)
        assert outcome
