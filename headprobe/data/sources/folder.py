"""A folder of images with one sub-folder per class, as torchvision and timm know it.

The folder is listed once, when it is opened. A link that leads out of it, or to a folder, is refused, not left out.
"""

import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from headprobe.data.sources.source import MOST_BYTES, PREFERRED_SPLITS, Chunk, LabelColumn, Request, Source, Unreadable
from headprobe.errors import RunError, UsageError

IMAGES_PER_UNIT = 128


IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})


# What is wrong with one file alone. Other errors (a disk or a server that went away, too many open files) would make
# every file bad one by one, so they end the unit.
OF_ONE_FILE = frozenset({errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP, errno.ENOTDIR})


def open_image_folder(request: Request, root: Path) -> Source:
    """Open class folders, or the split folder (`val/`, ...) that holds them.

    Raises:
        UsageError: The split, the class folders or the images are not there.
    """
    if request.unit == "row_group":
        raise UsageError("--data.unit must be file or auto where --data.path is a folder of images, got row_group")
    there = subfolders(root)
    if request.split and request.split not in there:
        choices = ", ".join(sorted(there)[:10])
        raise UsageError(f"--data.split must be a folder in {root.name} ({choices}), got {request.split}")

    usual = (split for split in PREFERRED_SPLITS if split in there and (there[split] or subfolders(root / split)))
    split = request.split or next(usual, "")
    refuse_link(root / split, bool(split) and there[split], root)
    return FolderSource(root / split, split, root)


class FolderSource(Source):
    """Images in class folders, in the order of a hash of their names.

    The order is the same on every machine, and every unit is a random sample: in the order of their names a unit
    would hold one class. Classes are numbered in the sorted order of their folders.

    A file that cannot be read when its turn comes is a bad image.

    Args:
        root: Folder of class folders.
        split: Name of the split.
        dataset: Folder that links to files may not lead out of: `--data.path`.

    Raises:
        UsageError: There are no class folders, no images in them, or a link that is not followed.
    """

    shuffled = True

    def __init__(self, root: Path, split: str, dataset: Path) -> None:
        self._root = root
        folders = subfolders(root)
        names = sorted(folders)
        for name in names:
            refuse_link(root / name, folders[name], dataset)

        sizes: dict[str, int] = {}
        for name in names:
            sizes.update(image_files(root, name, dataset))
        self._files = sorted(sizes, key=_hash)
        if not self._files:
            raise UsageError(f"--data.path must hold Parquet files, or one folder of images per class, got {root.name}")

        self._number = {name: number for number, name in enumerate(names)}
        self.images = len(self._files)
        self.units = -(-self.images // IMAGES_PER_UNIT)
        self.unit_sizes = [len(self._of_unit(unit)) for unit in range(self.units)]
        self.labels = LabelColumn("class", tuple(names))
        self.identity = {
            "split": split,
            "revision": None,
            "unit": f"{IMAGES_PER_UNIT} images",
            "files": self._digest(sizes),
        }

    def unit_name(self, unit: int) -> str:
        """Return the range of images that a unit holds."""
        first = unit * IMAGES_PER_UNIT
        return f"images {first} to {first + len(self._of_unit(unit)) - 1}"

    def chunks(self, unit: int, rows: int) -> Iterator[Chunk]:
        """Read a unit from its first image, `rows` images at a time.

        Raises:
            RunError: The disk or the whole folder cannot be read.
        """
        files = self._of_unit(unit)
        for first in range(0, len(files), rows):
            some = files[first : first + rows]
            labels = [self._number[file.split("/", 1)[0]] for file in some]
            yield Chunk([self._read(file) for file in some], labels, some)

    def _read(self, file: str) -> bytes | Unreadable:
        try:
            with (self._root / file).open("rb") as content:
                return content.read(MOST_BYTES + 1)
        except OSError as error:
            if error.errno not in OF_ONE_FILE or not self._root.is_dir():
                raise RunError(
                    f"{file} cannot be read: {error.strerror}. Run the same command again to resume"
                ) from None
            return Unreadable(f"the file cannot be read: {error.strerror}")

    def _of_unit(self, unit: int) -> list[str]:
        return self._files[unit * IMAGES_PER_UNIT : (unit + 1) * IMAGES_PER_UNIT]

    def _digest(self, sizes: dict[str, int]) -> list[dict[str, object]]:
        """Digest names and sizes; reading every image twice would be too dear."""
        lines = "".join(f"{file}\0{sizes[file]}\n" for file in self._files)
        digest = hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()
        return [{"name": "", "images": self.images, "names_and_sizes_sha256": digest}]


def subfolders(folder: Path) -> dict[str, bool]:
    """Return the names of the folders in a folder, hidden ones left out, and whether each is a link.

    A link that leads nowhere counts as one: it may be a folder on a disk that is not there now.

    Raises:
        UsageError: The folder cannot be listed.
    """
    return {entry.name: _is_link(entry) for entry in _entries(folder) if _is_folder(entry)}


def image_files(root: Path, name: str, dataset: Path) -> Iterator[tuple[str, int]]:
    """Yield the images in a class folder and the folders in it: path relative to `root`, and bytes.

    A link to a file inside `dataset` is as good as the file. One that leads nowhere is an image that cannot be read
    (of -1 bytes), so that it is not left out in silence.

    Raises:
        UsageError: A folder cannot be listed, or a link leads out of `dataset` or to a folder.
    """
    inside = os.path.join(os.path.realpath(dataset), "")
    waiting = [(root / name, name)]
    while waiting:
        folder, path = waiting.pop()
        for entry in _entries(folder):
            if Path(entry.name).suffix.lower() in IMAGE_SUFFIXES and _is_file(entry, inside, dataset):
                yield f"{path}/{entry.name}", _size(entry)
            elif _is_folder(entry):
                refuse_link(folder / entry.name, _is_link(entry), dataset)
                waiting.append((folder / entry.name, f"{path}/{entry.name}"))


def refuse_link(folder: Path, is_link: bool, dataset: Path) -> None:
    """Refuse to follow a link to a folder: it may lead anywhere, also in circles.

    Raises:
        UsageError: It is a link.
    """
    if is_link:
        raise UsageError(
            "links to folders are not followed: put the folder there instead of the link, or give --data.path the "
            f"folder it leads to, got {_arrow(folder, dataset)}"
        )


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise UsageError(f"{folder.name} cannot be listed: {error.strerror}; make it readable, got {folder}") from None


def _is_link(entry: os.DirEntry[str]) -> bool:
    # A junction is Windows' other link to a folder. Python 3.11 cannot name one.
    return entry.is_symlink() or (hasattr(entry, "is_junction") and entry.is_junction())


def _is_folder(entry: os.DirEntry[str]) -> bool:
    if not _is_link(entry):  # known from the listing, without a call of the system for each file
        return entry.is_dir()
    return os.path.isdir(entry.path) or not os.path.exists(entry.path)


def _is_file(entry: os.DirEntry[str], inside: str, dataset: Path) -> bool:
    if not _is_link(entry):
        return entry.is_file()
    if not os.path.realpath(entry.path).startswith(inside):
        raise UsageError(
            "links out of --data.path are not followed: put the files there instead of links, or give --data.path a "
            f"folder that holds both, got {_arrow(Path(entry.path), dataset)}"
        )
    return os.path.isfile(entry.path) or not os.path.exists(entry.path)


def _arrow(link: Path, dataset: Path) -> str:
    return f"{os.path.relpath(link, dataset)} -> {os.readlink(link)}"


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError:  # gone since it was listed, or a link that leads nowhere
        return -1


def _hash(file: str) -> bytes:
    return hashlib.sha256(file.encode("utf-8", "surrogateescape")).digest()
