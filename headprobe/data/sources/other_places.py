"""Places that hold images in another form: read where `datasets` reads it, else one message with what to do."""

import os
from pathlib import Path

from headprobe.data.sources.listing import TEXT_TABLES, Listing, no_image
from headprobe.data.sources.source import PREFERRED_SPLITS, Request, Source, local_name
from headprobe.errors import UsageError

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
ARROW = (
    "python -c \"import datasets; datasets.load_dataset('arrow', data_files='{0}', split='train')"
    ".to_parquet('NAME.parquet')\""
)
HOW = {
    (".zip",): "unpack it: python -m zipfile -e {} FOLDER, then --data.path FOLDER",
    (".7z", ".rar", ".gz", ".bz2", ".xz", ".zst"): "unpack it and give --data.path the folder",
    (".arrow", ".feather"): f"write it as Parquet: {ARROW}",
    (
        *(".npz", ".npy", ".mat", ".h5", ".hdf5", ".pkl", ".pickle", ".pt", ".pth", ".mdb", ".lmdb", ".tfrecord"),
        *(".tfrecords", ".rec", ".idx", ".bin"),
    ): "write images and labels as Parquet, by the lines in docs/own_model.md",
}
"""What to do with files of these suffixes."""


def open_other_file(request: Request, path: Path) -> Source | None:
    """Open a list of images or tars; None for a file that may be Parquet, whatever it is called.

    Raises:
        UsageError: It is something else, with what to do.
    """
    name = path.name.lower()
    if name.endswith(TEXT_TABLES) and path.is_file():
        from headprobe.data.sources.listed import open_table

        return open_table(request, path)
    if name.endswith(TAR_SUFFIXES):
        from headprobe.data.sources.saved import open_tars
        from headprobe.data.sources.streamed import files_of

        return open_tars(request, files_of(request, str(path)), "test")
    if how := remedy(path.suffix.lower(), path):
        raise UsageError(f"{local_name(path)} is not read here: {how}, got {request.shown}")
    kind = no_image(path.name)
    if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jfif", ".ppm"):
        raise UsageError(
            f"--data.path must be a folder with a sub-folder for each class, not a single image, got {request.shown}"
        )
    if kind is not None and kind != ".parquet" and path.is_file() and path.suffix:
        raise UsageError(
            f"--data.path must be a folder of images, Parquet files, tars, or a list of images (CSV, JSON lines), got "
            f"{request.shown}"
        )
    return None


def open_folder_without_images(request: Request, root: Path, listing: Listing) -> Source:
    """Open a folder of tars.

    Raises:
        UsageError: It holds something else, with what to do.
    """
    kinds = {kind for kind in listing.left_out.kinds if kind.startswith(".")}
    files = sorted(listing.tables)
    kinds |= {os.path.splitext(file)[1].lower() for file in files}
    if ".tar" in kinds:
        from headprobe.data.sources.streamed import open_data_folder

        return open_data_folder(request, root)
    for kind in sorted(kinds):
        if how := remedy(kind, root / _named([file for file in files if file.lower().endswith(kind)], kind)):
            raise UsageError(f"{local_name(root)} holds {kind} files and no images: {how}, got {request.shown}")
    raise UsageError(
        f"--data.path must hold Parquet files, or one folder of images per class, got {local_name(root)}"
        + (f" ({listing.left_out.text})" if listing.left_out.first else "")
    )


def remedy(suffix: str, path: Path) -> str:
    """Return what to do with a file of this suffix, "" where nothing special is known."""
    for suffixes, how in HOW.items():
        if suffix in suffixes:
            return how.format(path)
    return ""


def _named(files: list[str], kind: str) -> str:
    """Return the only file, or a glob of several: of one split where their names tell which (the hub's cache)."""
    if len(files) == 1:
        return files[0]
    split = next((usual for usual in PREFERRED_SPLITS if any(usual in file for file in files)), "")
    return f"*{split}*{kind}" if split else f"*{kind}"
