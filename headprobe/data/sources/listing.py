"""What lies below a folder: images, folders, and what is plainly no image, which is counted and not left out silently.

Every file is taken for an image unless its name says that it is something else: what an image is called differs
(`.jfif`, `.JPG_large`, no suffix at all), and one that cannot be decoded is a bad image with its reason.
"""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from headprobe.errors import UsageError
from headprobe.text import counted

TEXT_TABLES = (".csv", ".tsv", ".jsonl", ".json")
TABLES = (*TEXT_TABLES, ".parquet")  # what may list images
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # of datasets' own folders of images


# What no image is called: text and tables, documents, code, archives, arrays, sound and film, and what file managers,
# downloads and file servers leave behind. Raw images and vector graphics are not here: they are bad images.
NO_IMAGES = frozenset(
    """
    .txt .csv .tsv .json .jsonl .xml .md .rst .yaml .yml .toml .cfg .ini .conf .html .htm .css .js .url
    .lnk .webloc .pdf .doc .docx .odt .rtf .tex .bib .xls .xlsx .ods .ppt .pptx .py .ipynb .sh .bat .m
    .r .log .lock .pid .zip .tar .gz .tgz .bz2 .xz .zst .7z .rar .parquet .arrow .feather .h5 .hdf5 .npy
    .npz .mat .pkl .pickle .pt .pth .ckpt .safetensors .onnx .tfrecord .tfrecords .rec .idx .lst .lmdb
    .mdb .sqlite .db .md5 .sha1 .sha256 .sum .sig .mp4 .avi .mov .mkv .webm .mpg .mpeg .wav .mp3 .flac
    .ogg .xmp .aae .thm .bak .crdownload .download .part .partial .aria2 .info
    """.split()  # noqa: SIM905
)


NO_IMAGES_WITHOUT_SUFFIX = frozenset({"readme", "license", "licence", "copying", "makefile", "authors", "checksums"})


# Folders that systems and file servers (Synology, QNAP, NetApp, Windows, macOS) make; some hold a thumbnail of every
# image. Hidden ones need no entry.
SYSTEM_FOLDERS = frozenset(
    {
        *("@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "~snapshot", "lost+found", "__macosx"),
        *("$recycle.bin", "recycler", "system volume information", "network trash folder", "temporary items"),
        *("__pycache__", "resource.frk"),
    }
)


OWN_FOLDER, OWN_FILES = "lightning_logs", ("run.json", "masks.csv")  # of headprobe's results


@dataclass
class LeftOut:
    """What a listing leaves out, by kind.

    Attributes:
        kinds: How many there are of each kind: a suffix, `hidden` or another word.
        first: Path of the first of them in the order of their names, "" for none.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    first: str = ""

    def add(self, kind: str, path: str) -> None:
        """Count one file or folder."""
        self.kinds[kind] += 1
        self.first = min(self.first or path, path)

    @property
    def text(self) -> str:
        """All of it on one line."""
        number = self.kinds.total()
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.kinds.most_common(6))
        more = ", ..." if len(self.kinds) > 6 else ""
        verb = "is plainly no image" if number == 1 else "are plainly no images"
        return f"{counted(number, 'file')} {verb} ({kinds}{more}), first {self.first}"


@dataclass
class FolderFacts:
    """What lies below one folder of the first level.

    Attributes:
        images: Images in it and below.
        direct: Images directly in it.
        inner: Names of all folders below it that hold images, at any depth.
        deeper: Path of the first image below one of these, "" for none.
        others: Files that are plainly no images, aside from hidden ones and those that systems make; and folders of
            headprobe's results.
        metadata: Whether a file of `METADATA_FILES` lies directly in it.
    """

    images: int = 0
    direct: int = 0
    inner: set[str] = field(default_factory=set)
    deeper: str = ""
    others: int = 0
    metadata: bool = False


@dataclass
class Listing:
    """Everything below one folder.

    Attributes:
        images: What the system says of every image (`stamp`), by its path in folders of the first level and below.
        folders: What lies in each folder of the first level.
        loose: Images directly in the folder itself.
        tables: Names of text files directly in the folder itself, which may list images.
        left_out: Files that are plainly no images, other than directly in the folder itself.
    """

    images: dict[str, str] = field(default_factory=dict)
    folders: dict[str, FolderFacts] = field(default_factory=dict)
    loose: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)


def list_images(root: Path, dataset: Path) -> Listing:
    """List a folder of folders of images.

    Args:
        root: The folder.
        dataset: Folder that links to files may not lead out of: `--data.path`.

    Raises:
        UsageError: A folder cannot be listed, or a link leads out of `dataset` or to a folder.
    """
    listing = Listing()
    inside = os.path.join(os.path.realpath(dataset), "")
    for entry in entries(root):
        if is_folder(entry):
            if is_own_folder(entry.path):
                continue
            if is_system_folder(entry.name):
                listing.left_out.add(_kind_of_system(entry.name), entry.name)
                continue
            refuse_link(root / entry.name, is_link(entry), dataset)
            listing.folders[entry.name] = _list_folder(root, entry.name, dataset, inside, listing)
        elif no_image(entry.name) is None and is_file(entry, inside, dataset):
            listing.loose.append(entry.name)
        elif no_image(entry.name) != "hidden":
            listing.tables.append(entry.name)
    listing.loose.sort()
    return listing


def _list_folder(root: Path, name: str, dataset: Path, inside: str, listing: Listing) -> FolderFacts:
    facts = FolderFacts()
    waiting = [(root / name, name)]
    while waiting:
        folder, path = waiting.pop()
        images = 0
        for entry in entries(folder):
            here = f"{path}/{entry.name}"
            kind = no_image(entry.name)
            if is_folder(entry) and not _is_lost_file(entry):
                if is_own_folder(entry.path):
                    facts.others += 1
                    continue
                if is_system_folder(entry.name):
                    listing.left_out.add(_kind_of_system(entry.name), here)
                    continue
                refuse_link(folder / entry.name, is_link(entry), dataset)
                waiting.append((folder / entry.name, here))
            elif kind is not None:
                listing.left_out.add(kind, here)
                facts.others += kind.startswith(".")  # not `Thumbs.db`
                facts.metadata |= path == name and entry.name in METADATA_FILES
            elif is_file(entry, inside, dataset):
                listing.images[here] = stamp(entry)
                images += 1
                if path != name:
                    facts.deeper = min(facts.deeper or here, here)
            else:
                listing.left_out.add("pipe or device", here)
        facts.images += images
        facts.direct += images if path == name else 0
        if images:
            facts.inner.update(path.split("/")[1:])
    return facts


def no_image(name: str) -> str | None:
    """Return what a file plainly is that is no image, by its name: a suffix or another word; None if it may be one."""
    if name.startswith("."):  # also macOS's `._a.jpg`, which is no image
        return "hidden"
    stem, suffix = os.path.splitext(name)
    lower = suffix.lower()
    if lower == ".db" or name.lower() == "desktop.ini":
        return name
    if lower in NO_IMAGES:
        return lower
    if name == "Icon\r" or (not suffix and stem.lower() in NO_IMAGES_WITHOUT_SUFFIX):
        return stem.strip()
    return None


def is_system_folder(name: str) -> bool:
    """Return whether a folder is hidden, or one that a system or a file server makes for itself."""
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def is_own_folder(folder: Path | str) -> bool:
    """Return whether headprobe wrote a folder: its results are never part of the data that they lie beside or in."""
    if os.path.basename(folder) == OWN_FOLDER:
        return True
    return all(os.path.isfile(os.path.join(folder, name)) for name in OWN_FILES)


def is_own_file(file: str, root: Path) -> bool:
    """Return whether a file lies in a hidden folder below `root` or in one of headprobe's results."""
    if ".." in Path(file).parts:  # leads out of the folder: that is refused, and never left out in silence
        return False
    folders = [folder for folder in Path(file).parents if folder != root and folder.is_relative_to(root)]
    return any(folder.name.startswith(".") or is_own_folder(folder) for folder in folders)


def holds_parquet(folder: Path, levels: int) -> bool:
    """Return whether a folder or those in it hold Parquet files, other than a description of images.

    Args:
        folder: The folder; hidden ones in it and headprobe's own are left out.
        levels: How many levels to look at.
    """
    try:
        with os.scandir(folder) as found:
            there = list(found)
    except OSError:  # whoever lists the images says so
        return False
    deeper = []
    for entry in there:
        if is_system_folder(entry.name):
            continue
        if entry.name.endswith(".parquet") and entry.name != "metadata.parquet" and not _leads_to_folder(entry):
            return True
        if levels > 1 and _leads_to_folder(entry) and not is_own_folder(entry.path):
            deeper.append(Path(entry.path))
    return any(holds_parquet(inner, levels - 1) for inner in deeper)


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether this is a folder that is there; without a call of the system for what is no link."""
    return os.path.isdir(entry.path) if is_link(entry) else entry.is_dir()


def _kind_of_system(name: str) -> str:
    return "hidden" if name.startswith(".") else name


def subfolders(folder: Path) -> dict[str, bool]:
    """Return the names of the folders in a folder, and whether each is a link; the system's and ours are left out.

    A link that leads nowhere counts as one: it may be a folder on a disk that is not there now.

    Raises:
        UsageError: The folder cannot be listed.
    """
    found = (entry for entry in entries(folder) if not is_system_folder(entry.name))
    return {entry.name: is_link(entry) for entry in found if is_folder(entry) and not is_own_folder(entry.path)}


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


def entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return what lies in a folder.

    Raises:
        UsageError: It cannot be listed.
    """
    try:
        with os.scandir(folder) as found:
            return list(found)
    except OSError as error:
        name = os.path.basename(os.path.abspath(folder))
        raise UsageError(f"{name} cannot be listed: {error.strerror}; make it readable, got {folder}") from None


def is_link(entry: os.DirEntry[str]) -> bool:
    """Return whether this is a link, or a junction: Windows' other link to a folder, which Python 3.11 cannot name."""
    return entry.is_symlink() or (hasattr(entry, "is_junction") and entry.is_junction())


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether this is a folder, or a link that leads to one or nowhere."""
    if not is_link(entry):  # known from the listing, without a call of the system for each file
        return entry.is_dir()
    return os.path.isdir(entry.path) or not os.path.exists(entry.path)


def is_file(entry: os.DirEntry[str], inside: str, dataset: Path) -> bool:
    """Return whether this is a file, or a link to one of the same dataset (or to nowhere).

    Raises:
        UsageError: It is a link that leads out of the dataset.
    """
    if not is_link(entry):
        return entry.is_file()
    if not os.path.realpath(entry.path).startswith(inside):
        raise leads_out(_arrow(Path(entry.path), dataset))
    return os.path.isfile(entry.path) or not os.path.exists(entry.path)


def leads_out(link: str) -> UsageError:
    """Return the refusal of a link to a file outside of the dataset."""
    return UsageError(
        "links out of --data.path are not followed: put the files there instead of links, or give --data.path a folder "
        f"that holds both, got {link}"
    )


def _is_lost_file(entry: os.DirEntry[str]) -> bool:
    """Return whether this is a link that leads nowhere and is called like a file: a bad image, not a folder."""
    return bool(os.path.splitext(entry.name)[1]) and is_link(entry) and not os.path.exists(entry.path)


def _arrow(link: Path, dataset: Path) -> str:
    return f"{os.path.relpath(link, dataset)} -> {os.readlink(link)}"


def stamp(file: os.DirEntry[str] | Path) -> str:
    """Return size, time of the last change and number on its disk of a file; "" where nobody can say.

    A file may be gone since it was listed, or be a link that leads nowhere. Uncompressed images of one shape have one
    size, and copying tools may keep times: so the file's own number too.
    """
    try:
        facts = file.stat()
    except OSError:
        return ""
    return f"{facts.st_size} {facts.st_mtime_ns} {facts.st_ino}"


def metadata_files(folder: Path) -> list[Path]:
    """Return the files of metadata that lie directly in a folder."""
    return [folder / name for name in METADATA_FILES if (folder / name).is_file()]
