"""`report`: makes the page of finished runs from their files, without the model; needs no torch."""

import csv
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from headprobe.commands.parser import Parser
from headprobe.errors import RunError, UsageError
from headprobe.files import shown
from headprobe.report.page.build import write_page
from headprobe.run.load import RunFiles, load_files
from headprobe.text import first_line

NAME = "report.html"

OURS = b'name="generator" content="headprobe'
"""By which a page is known as one of ours."""

BEGINNING = 4096
"""Bytes of a file that are searched for it."""

BROKEN = (csv.Error, KeyError, OSError, TypeError, ValueError, zipfile.BadZipFile)
"""What reading the files of a run raises where one is cut off, or of another program."""


def run(words: list[str]) -> None:
    """Run the command with the words after its name.

    Raises:
        UsageError: A path is no finished run, or the page would replace a file that is none of ours.
        RunError: The files of a run are broken, or the page cannot be written.
    """
    parser = Parser(prog="headprobe report", description=DESCRIPTION)
    parser.add_argument("runs", type=str, nargs="+", help="Folders of runs, such as lightning_logs/version_0.")
    parser.add_argument(
        "--output", type=str, default="", help=f"The page's file [RUN/{NAME}; of several runs {NAME} in this folder]."
    )
    options = parser.parse_args(words)
    runs = [load_run(path) for path in _each_once(options.runs)]
    page = _output(options.output, runs)
    sys.stdout.write(f"{shown(_write(runs, page).absolute())}\n")


DESCRIPTION = (
    "Make the page of finished runs from their files: of one run what it found, of several the same side by side. Runs "
    "of any age will do; what a run has no files for is left out."
)


def _each_once(paths: Sequence[str]) -> Sequence[str]:
    resolved = [Path(path).resolve() for path in paths]
    twice = [path for path, own in zip(paths, resolved, strict=True) if resolved.count(own) > 1]
    if twice:
        raise UsageError(f"report takes each run once, got {twice[-1]!r} twice")
    return paths


def load_run(path: str) -> RunFiles:
    """Read the files of a run that a user named.

    Raises:
        UsageError: It is no finished run.
        RunError: One of its files is broken.
    """
    try:
        return load_files(path)
    except UsageError:
        raise
    except BROKEN as error:
        raise RunError(broken(path, error)) from error


def broken(paths: str, error: BaseException) -> str:
    """Return the message for runs with a file that is cut off, or of another program."""
    return (
        f"the files of {paths} cannot be read, as one is cut off or not headprobe's; the command in its run.json makes "
        f"them again, got {type(error).__name__}: {first_line(error)}"
    )


def _output(given: str, runs: Sequence[RunFiles]) -> Path:
    """Return the page's file.

    Raises:
        UsageError: A file is there that is no page of ours.
    """
    page = Path(given) if given else runs[0].path / NAME if len(runs) == 1 else Path(NAME)
    if page.is_dir():
        raise UsageError(f"--output must be a file such as {page / NAME}, got the folder {str(page)!r}")
    if page.exists() and OURS not in _beginning(page):
        raise UsageError(
            f"{str(page)!r} is there already and is no page of headprobe's: name another file with --output, got a "
            "file that would be lost"
        )
    return page


def _beginning(page: Path) -> bytes:
    try:
        with page.open("rb") as file:
            return file.read(BEGINNING)
    except OSError as error:
        raise UsageError(f"--output cannot be read to see whose it is ({error.strerror}), got {str(page)!r}") from error


def _write(runs: Sequence[RunFiles], page: Path) -> Path:
    try:
        return write_page(runs, page)
    except BROKEN as error:
        if isinstance(error, UsageError):
            raise
        raise RunError(broken(", ".join(str(one.path) for one in runs), error)) from error
