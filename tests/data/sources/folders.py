"""Folders of images made on the spot, from their paths alone."""

from collections.abc import Iterable
from pathlib import Path

from tests.data.parquet_sets import png


def write(root: Path, files: Iterable[str], content: bytes | None = None) -> Path:
    """Write images, numbered through by colour; a path that ends in a slash is an empty folder."""
    for number, file in enumerate(files):
        path = root / file
        if file.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number) if content is None else content)
    return root


def crossed(firsts: Iterable[str], seconds: Iterable[str], files: str = "1.png 2.png") -> list[str]:
    """Return FIRST/SECOND/FILE for all of them; a first or second "" leaves that folder out."""
    names = [(first, second, file) for first in firsts for second in list(seconds) for file in files.split()]
    return ["/".join(filter(None, parts)) for parts in names]
