"""A folder of images with one sub-folder per class, as torchvision and timm know it."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from headprobe.data.source import PREFERRED_SPLITS, Chunk, LabelColumn, Request, Source
from headprobe.errors import RunError, UsageError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
IMAGES_PER_UNIT = 128


class FolderSource(Source):
    """Images in class folders, in the order of a hash of their names.

    The order is the same on every machine, and every unit is a random sample: in the order of their names a unit
    would hold one class. Classes are numbered in the sorted order of their folders.

    Raises:
        UsageError: There are no class folders, or no images in them.
    """

    def __init__(self, root: Path, split: str) -> None:
        self._root = root
        names = sorted(folder.name for folder in _subfolders(root))
        self._files = sorted(_images(root, names), key=_hash)
        if not self._files:
            raise UsageError(f"--data.path must hold Parquet files, or one folder of images per class, got {root.name}")
        self._number = {name: number for number, name in enumerate(names)}
        self.images = len(self._files)
        self.units = -(-self.images // IMAGES_PER_UNIT)
        self.unit_sizes = [len(self._of_unit(unit)) for unit in range(self.units)]
        self.labels = LabelColumn("class", tuple(names))
        self.facts = {"split": split, "revision": None, "unit": f"{IMAGES_PER_UNIT} images", "files": self._digest()}

    def unit_name(self, unit: int) -> str:
        """Name the images of a unit."""
        first = unit * IMAGES_PER_UNIT
        return f"images {first} to {first + len(self._of_unit(unit)) - 1}"

    def chunks(self, unit: int, rows: int) -> Iterator[Chunk]:
        """Read a unit from its first image, `rows` images at a time."""
        files = self._of_unit(unit)
        for first in range(0, len(files), rows):
            part = files[first : first + rows]
            labels = [self._number[file.split("/", 1)[0]] for file in part]
            yield Chunk([self._read(file) for file in part], labels, part)

    def _read(self, file: str) -> bytes:
        try:
            return (self._root / file).read_bytes()
        except OSError as error:
            raise RunError(f"{file} cannot be read: {error.strerror}") from None

    def _of_unit(self, unit: int) -> list[str]:
        return self._files[unit * IMAGES_PER_UNIT : (unit + 1) * IMAGES_PER_UNIT]

    def _digest(self) -> list[dict[str, object]]:
        """Digest names and sizes; reading every image twice would be too dear."""
        lines = "".join(f"{file}\0{(self._root / file).stat().st_size}\n" for file in self._files)
        digest = hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()
        return [{"name": "", "images": self.images, "names_and_sizes_sha256": digest}]


def open_image_folder(request: Request, root: Path) -> Source:
    """Open class folders, or the split folder (`val/`, ...) that holds them.

    Raises:
        UsageError: The split, the class folders or the images are not there.
    """
    if request.unit == "row_group":
        raise UsageError("--data.unit must be file or auto where --data.path is a folder of images, got row_group")
    there = [folder.name for folder in _subfolders(root)]
    if request.split:
        if request.split not in there:
            choices = ", ".join(sorted(there)[:10])
            raise UsageError(f"--data.split must be a folder in {root.name} ({choices}), got {request.split}")
        return FolderSource(root / request.split, request.split)
    for split in PREFERRED_SPLITS:
        if split in there and _subfolders(root / split):
            return FolderSource(root / split, split)
    return FolderSource(root, "")


def _subfolders(root: Path) -> list[Path]:
    return [entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")]


def _images(root: Path, names: list[str]) -> list[str]:
    files = (file for name in names for file in (root / name).rglob("*"))
    return [file.relative_to(root).as_posix() for file in files if _is_image(file)]


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".") and file.is_file()


def _hash(file: str) -> bytes:
    return hashlib.sha256(file.encode("utf-8", "surrogateescape")).digest()
