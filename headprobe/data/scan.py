"""What lies in a folder of images: its class folders and files, and no link that leads out of it."""

import os
from collections.abc import Iterator
from pathlib import Path

from headprobe.errors import UsageError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})


def subfolders(folder: Path) -> dict[str, bool]:
    """Return the names of the folders in a folder, hidden ones left out, and whether each is a link.

    A link that leads nowhere counts as one: it may be a folder on a disk that is not there now.

    Raises:
        UsageError: The folder cannot be listed.
    """
    return {entry.name: entry.is_symlink() for entry in _entries(folder) if _is_folder(entry)}


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
                refuse_link(folder / entry.name, entry.is_symlink(), dataset)
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


def _is_folder(entry: os.DirEntry[str]) -> bool:
    if not entry.is_symlink():  # known from the listing, without asking for each file
        return entry.is_dir()
    return os.path.isdir(entry.path) or not os.path.exists(entry.path)


def _is_file(entry: os.DirEntry[str], inside: str, dataset: Path) -> bool:
    if not entry.is_symlink():
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
