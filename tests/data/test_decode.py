import contextlib
import io
import json
import os
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform

from headprobe.data import decode
from headprobe.data.decode import ImageError, ImageReader
from headprobe.errors import UsageError
from tests.data.parquet_sets import DATA_CONFIG, encoded, png

ROOT = Path(__file__).resolve().parents[2]
MODES = ["RGB", "L", "LA", "P", "RGBA", "1", "CMYK"]


@pytest.fixture(scope="module")
def reader() -> ImageReader:
    return ImageReader(DATA_CONFIG)


def noise(mode: str = "RGB", size: tuple[int, int] = (37, 23), seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def by_hand(width: int, height: int, kind: int = 0, depth: int = 1, extra: bytes = b"") -> bytes:
    """Return a PNG of zeros, written by hand: Pillow would need as much memory to write it as to read it."""

    packer = zlib.compressobj(1)
    line = bytes(1 + (width * depth + 7) // 8)
    packed = b"".join(packer.compress(line) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def by_timm(content: bytes, mode: str = "RGB", **options: bool) -> Any:
    """Return what timm's validation would feed the model (ImageDataset opens like this), normalised or not."""
    image = Image.open(io.BytesIO(content)).convert(mode)
    return create_transform(**DATA_CONFIG, is_training=False, **options)(image)


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


def test_an_eps_is_a_bad_image_and_no_program_is_started(
    reader: ImageReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trap = tmp_path / "gs"
    trap.write_text(f"#!/bin/sh\necho called > {tmp_path}/called\n")
    trap.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    content = encoded(noise(), "eps")
    with pytest.raises(ImageError, match="not an image file of a kind that is read here"):
        reader(content)
    assert not (tmp_path / "called").exists()
    with contextlib.suppress(OSError):  # the trap is one: Pillow itself falls into it
        Image.open(io.BytesIO(content)).load()
    assert (tmp_path / "called").exists()


@pytest.mark.parametrize("kind", ["pdf", "ico", "icns", "tga", "pcx", "dds", "sgi", "jpeg2000", "im", "spider"])
def test_other_kinds_that_pillow_knows_are_bad_images(reader: ImageReader, kind: str) -> None:
    with pytest.raises(ImageError, match="not an image file of a kind that is read here"):
        reader(encoded(noise("F" if kind == "spider" else "RGB"), kind))


def test_the_largest_size_is_decoded_and_one_line_more_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MOST_PIXELS", 37 * 23)
    reader = ImageReader(DATA_CONFIG)
    monkeypatch.setattr(reader, "_longest_aspect", 1000)
    assert reader(encoded(noise(size=(37, 23)))).shape == (3, 16, 16)
    with pytest.raises(ImageError, match="at most 851 pixels, got 37 x 24"):
        reader(encoded(noise(size=(37, 24))))


# What is decoded needs 4 bytes for each of 89 million pixels, once more for its conversion; files just below Pillow's
# own limit would need twice that, and animations that for every picture.
BOMBS = {
    "PNG of 13,300 x 13,300 in black and white": by_hand(13_300, 13_300),
    "PNG of 13,300 x 13,300 in 16 bits": by_hand(13_300, 13_300, depth=16),
    "PNG with 3 MB of text for 3 KB": by_hand(4, 4, extra=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(3_000_000)))),
    "PNG with 200 MB of profile for 200 KB": by_hand(
        4, 4, extra=chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(200_000_000), 1))
    ),
    "PPM that promises 9000 x 9000": b"P6 9000 9000 255\n" + bytes(100),
    "GIF of 60,000 x 60,000": b"GIF89a" + struct.pack("<HH", 60_000, 60_000) + bytes(99),
}
MEASURE = """
import json, resource, sys, time
from pathlib import Path
from headprobe.data.decode import ImageError, ImageReader
reader = ImageReader(json.loads(sys.argv[1]))
for file in sys.argv[2:]:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        reader(Path(file).read_bytes())
    except ImageError:
        pass
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, time.process_time() - start)
"""


def animation(kind: str) -> bytes:
    first, *others = (noise("L", (500, 400), seed).convert("RGB") for seed in range(60))
    content = encoded(first, kind, save_all=True, append_images=others, lossless=True)
    assert Image.open(io.BytesIO(content)).n_frames == 60  # type: ignore[attr-defined]
    return content


@pytest.mark.slow
def test_bombs_take_little_memory_and_time(tmp_path: Path) -> None:
    # First a warm-up; animations next, as the peak only grows: all of their pictures would be 48 MB.
    cases = {"warm-up": png(0), **{kind: animation(kind) for kind in ("gif", "webp", "tiff")}, **BOMBS}
    files = [tmp_path / str(number) for number in range(len(cases))]
    for file, content in zip(files, cases.values(), strict=True):
        file.write_bytes(content)
    words = [sys.executable, "-c", MEASURE, json.dumps(DATA_CONFIG), *map(str, files)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=True)
    costs = dict(zip(cases, (tuple(map(float, line.split())) for line in done.stdout.splitlines()), strict=True))
    del costs["warm-up"]
    assert {case: cost for case, cost in costs.items() if cost[0] >= (400 if case in BOMBS else 40)} == {}
    assert {case: cost for case, cost in costs.items() if cost[1] >= 5} == {}


@pytest.mark.parametrize("kind", ["gif", "webp", "tiff"])
def test_of_many_pictures_in_one_file_the_first_is_taken(reader: ImageReader, kind: str) -> None:
    content = encoded(noise(), kind, save_all=True, append_images=[noise(seed=1)], lossless=True)
    assert torch.equal(reader(content), torch.as_tensor(by_timm(content, use_prefetcher=True)))


def test_a_jpeg_of_thousands_of_scans_is_refused(reader: ImageReader) -> None:
    content = encoded(noise(size=(900, 600)), "jpeg", progressive=True)
    scan = content.rindex(b"\xff\xda")
    many = content[:scan] + content[scan:-2] * 600 + content[-2:]
    with pytest.raises(ImageError, match=r"at most 500 scans, got 6\d\d"):
        reader(many)


def test_an_image_that_a_large_model_would_blow_up_is_refused() -> None:
    large = ImageReader(DATA_CONFIG | {"input_size": (3, 1024, 1024)})
    with pytest.raises(ImageError, match="too long to resize: 1 x 100 pixels"):
        large(encoded(noise(size=(1, 100))))


@pytest.mark.parametrize("mode", ["F", "I"])
def test_numbers_without_a_known_range_are_refused(reader: ImageReader, mode: str) -> None:
    with pytest.raises(ImageError, match=r"which .* numbers are black and white"):
        reader(encoded(noise("L").convert(mode), "tiff"))


def test_sixteen_bits_in_a_ppm_are_scaled_too(reader: ImageReader) -> None:
    content = b"P5 2 2 65535\n" + struct.pack(">4H", *[77 * 257] * 4)
    assert reader(content).unique().tolist() == [77]


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (128, 0), (129, 1), (257, 1), (65_535, 255), (65_406, 254)])
def test_sixteen_bits_are_rounded_to_the_nearest(reader: ImageReader, value: int, expected: int) -> None:
    grey = Image.fromarray(np.full((20, 20), value, dtype=np.uint16))
    assert reader(encoded(grey)).unique().tolist() == [expected]


def test_transparency_is_dropped_as_timm_does(reader: ImageReader) -> None:
    glass = Image.new("RGBA", (20, 20), (10, 200, 30, 0))
    assert reader(encoded(glass))[:, 0, 0].tolist() == [10, 200, 30]


def test_nothing_is_said_on_the_terminal_about_a_bad_image(
    reader: ImageReader, recwarn: pytest.WarningsRecorder, capfd: pytest.CaptureFixture[str]
) -> None:
    palette = encoded(noise("P"), transparency=b"\x00\x80\xff")  # Pillow warns at its conversion
    bomb = by_hand(12_000, 9_000)  # and of this size
    for content in (palette, bomb, encoded(noise(), "jpeg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")):
        with contextlib.suppress(ImageError):
            reader(content)
    assert [str(warning.message) for warning in recwarn] == []
    assert capfd.readouterr() == ("", "")


def test_a_file_beyond_the_limit_of_bytes_is_refused(reader: ImageReader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MOST_BYTES", 100)
    with pytest.raises(ImageError, match="at most 100 bytes"):
        reader(encoded(noise()))
