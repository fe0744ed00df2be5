"""Finds out what kind of place `--data.path` names, and opens it."""

import glob
import re
from itertools import chain
from pathlib import Path

from headprobe.data.sources.folder import open_image_folder
from headprobe.data.sources.source import Request, Source
from headprobe.errors import UsageError

BUNDLED_DATA = "digits"  # a folder of the package


HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def open_source(request: Request) -> Source:
    """Open the bundled digits, a local folder, Parquet files, or a hub dataset, in this order of preference.

    Raises:
        UsageError: There is nothing at that path, or not what the user wants.
        RunError: It is there and cannot be read.
    """
    # `datasets` takes a second to import, and `headprobe test --help` does not need it.
    from headprobe.data.sources.hub import open_hub
    from headprobe.data.sources.local import open_parquet_files, open_parquet_folder

    path = request.path
    local = _local(path)
    if request.revision is not None and is_local(path):
        raise UsageError(f"--data.revision is for hub datasets; {path} is on this machine, got {request.revision}")
    if local.is_dir():
        return open_parquet_folder(request, local) if _holds_parquet(local) else open_image_folder(request, local)
    if is_local(path):
        return open_parquet_files(request, str(local))
    if not HUB_ID.fullmatch(path) or path.endswith(".parquet"):
        raise UsageError(f"--data.path names no file or folder here and is no hub id (owner/name), got {path}")
    return open_hub(request)


def is_local(path: str) -> bool:
    """Return whether a path names something on this machine: a folder, a file or a glob."""
    return _local(path).exists() or glob.has_magic(path)


def _local(path: str) -> Path:
    return Path(__file__).parents[1] / BUNDLED_DATA if path == BUNDLED_DATA else Path(path).expanduser()


def _holds_parquet(folder: Path) -> bool:
    # Three levels, as the hub's layouts have: walking through a whole folder of images would take long.
    patterns = ("*.parquet", "*/*.parquet", "*/*/*.parquet")
    return next(chain.from_iterable(folder.glob(pattern) for pattern in patterns), None) is not None
