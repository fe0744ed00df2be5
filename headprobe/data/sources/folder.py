"""A folder of images with one sub-folder per class, as torchvision and timm know it, or with a list of their labels.

The folder is listed once, when it is opened. A link that leads out of it, or to a folder, is refused, not left out.
"""

import errno
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headprobe.data.sources.layout import THE_FOLDER_ITSELF, WORDNET_ID, check_classes, choose_folder
from headprobe.data.sources.listing import METADATA_FILES, Listing, entries, list_images, refuse_link, stamp, subfolders
from headprobe.data.sources.source import MOST_BYTES, NOT_READ, Chunk, LabelColumn, Request, Source, Unreadable, some
from headprobe.errors import RunError, UsageError
from headprobe.text import Decision, counted

IMAGES_PER_UNIT = 128


# What is wrong with one file alone. Other errors (a disk or a server that went away, too many open files) would make
# every file bad one by one, so they end the unit.
OF_ONE_FILE = frozenset({errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP, errno.ENOTDIR})


def open_image_folder(request: Request, root: Path) -> Source:
    """Open class folders, or the split folder (`val/`, ...) that holds them, or images that a metadata file lists.

    A folder without any image may hold something else that is read, or that has a message of its own.

    Raises:
        UsageError: The split, the class folders or the images are not there, or the folders may not be classes.
    """
    if request.unit == "row_group":
        raise UsageError("--data.unit must be file or auto where --data.path is a folder of images, got row_group")
    chosen = choose_folder(request, root)
    split = "" if chosen == THE_FOLDER_ITSELF else chosen
    refuse_link(root / split, bool(split) and subfolders(root)[split], root)

    if chosen != THE_FOLDER_ITSELF and any(
        entry.name in METADATA_FILES for place in {root, root / split} for entry in entries(place)
    ):
        from headprobe.data.sources.listed import open_metadata

        return open_metadata(request, root, split)

    listing = list_images(root / split, root)
    if not request.labelled and (listing.images or listing.loose):
        return open_any_images(root / split, split, listing)
    if not listing.images and not listing.loose and chosen != THE_FOLDER_ITSELF:
        from headprobe.data.sources.other_places import open_folder_without_images

        return open_folder_without_images(request, root, listing)
    if chosen != THE_FOLDER_ITSELF:
        check_classes(listing, request, root, split)
    elif not listing.images:
        raise UsageError(f"--data.split . needs a folder of images for each class in --data.path, got {request.shown}")
    return open_class_folders(root / split, split, listing)


def open_any_images(root: Path, split: str, listing: Listing) -> Source:
    """Return all images of a folder and of the folders in it, without labels."""
    stamps = {**listing.images, **{name: stamp(root / name) for name in listing.loose}}
    files = ImageFiles(root, split, stamps, dict.fromkeys(stamps), NOT_READ)
    folders = sum(bool(facts.images) for facts in listing.folders.values())
    where = (
        f"directly in it and in {counted(folders, 'folder')}" if listing.loose else f"in {counted(folders, 'folder')}"
    )
    text = f"all {len(stamps):,} images {where if folders else 'directly in it'}; folders are no classes here"
    return FolderSource(files, [*left_out(listing), Decision("images without labels", text, shown=bool(folders))])


def open_class_folders(root: Path, split: str, listing: Listing) -> Source:
    """Return the images of class folders, numbered in the sorted order of the folders' names.

    A folder of nothing but other files is no class; one without files is a class without images.
    """
    names = sorted(name for name, facts in listing.folders.items() if facts.images or not facts.others)
    number = {name: index for index, name in enumerate(names)}
    labels = {file: number[file.split("/", 1)[0]] for file in listing.images}
    files = ImageFiles(root, split, listing.images, labels, LabelColumn("class", tuple(names)))
    return FolderSource(files, _decisions(listing, names))


def _decisions(listing: Listing, names: Sequence[str]) -> list[Decision]:
    """Say what was left out, and which folders were taken for what where someone may not expect it."""
    found = left_out(listing)
    facts = listing.folders
    if listing.loose:
        beside = f"{counted(len(listing.loose), 'image')} in no class folder, first {listing.loose[0]}"
        found.append(Decision("images left out", beside, shown=True))
    if empty := [name for name in names if not facts[name].images]:
        text = f"{counted(len(empty), 'class folder')} without an image: {some(empty)}; still classes of the data"
        found.append(Decision("empty classes", text, shown=True))
    if strangers := sorted(facts.keys() - set(names)):
        text = f"{counted(len(strangers), 'folder')} of other files only, taken for no class: {some(strangers)}"
        found.append(Decision("folders left out", text, shown=True))
    if deeper := sorted(one.deeper for one in facts.values() if one.deeper):
        images = sum(one.images - one.direct for one in facts.values())
        lie = "image lies" if images == 1 else "images lie"
        text = f"{images:,} {lie} in folders inside of the class folders, first {deeper[0]}: the outer one is the class"
        found.append(Decision("folders in classes", text, shown=not all(map(WORDNET_ID.match, names))))
    return found


def left_out(listing: Listing) -> list[Decision]:
    """Return the one line on files that are plainly no images, none where there are none."""
    return [Decision("files left out", listing.left_out.text, shown=True)] if listing.left_out.first else []


@dataclass(frozen=True)
class ImageFiles:
    """Images of a folder with their labels.

    Attributes:
        root: The folder.
        split: Name of the split, "" for none.
        stamps: What the system says of each image (`stamp` of `listing`), by its path in the folder.
        labels: Label of each of them.
        column: How they are labelled.
        identity: What identifies the labels, where names and sizes of files do not.
    """

    root: Path
    split: str
    stamps: dict[str, str]
    labels: dict[str, Any]
    column: LabelColumn
    identity: dict[str, Any] | None = None


class FolderSource(Source):
    """Images in files of a folder, in the order of a hash of their names.

    The order is the same on every machine, and every unit is a random sample: in the order of their names a unit
    would hold one class.

    A file that cannot be read when its turn comes is a bad image.

    Args:
        files: The images; at least one.
        decisions: What was decided about them.
    """

    shuffled = True

    def __init__(self, files: ImageFiles, decisions: Sequence[Decision]) -> None:
        self._root = files.root
        self._labels = files.labels
        self._files = sorted(files.stamps, key=_hash)

        self.images = len(self._files)
        self.units = -(-self.images // IMAGES_PER_UNIT)
        self.unit_sizes = [len(self._of_unit(unit)) for unit in range(self.units)]
        self.labels = files.column
        self.decisions = decisions
        self.identity = {
            "split": files.split,
            "revision": None,
            "unit": f"{IMAGES_PER_UNIT} images",
            "files": self._digest(files.stamps),
            **(files.identity or {}),
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
            yield Chunk([self._read(file) for file in some], [self._labels[file] for file in some], some)

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

    def _digest(self, stamps: dict[str, str]) -> list[dict[str, object]]:
        """Digest names and what the system says of each file; reading every image twice would be too dear."""
        lines = "".join(f"{file}\0{stamps[file]}\n" for file in self._files)
        digest = hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()
        return [{"name": "", "images": self.images, "names_sizes_and_times_sha256": digest}]


def _hash(file: str) -> bytes:
    return hashlib.sha256(file.encode("utf-8", "surrogateescape")).digest()
