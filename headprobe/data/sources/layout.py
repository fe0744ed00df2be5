"""Whether folders are classes: folders of splits, and folders around them, are never taken for classes silently.

`SET/train/cat/1.jpg` and `SET/cat/video_1/1.jpg` look alike. What decides is where the images lie, which names come
again, and names that no class has. Where that is not enough the user says which it is: `--data.split .` makes the
folders that lie in `--data.path` classes, whatever they hold.
"""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

from headprobe.data.sources.listing import (
    METADATA_FILES,
    TABLES,
    FolderFacts,
    Listing,
    entries,
    no_image,
    subfolders,
)
from headprobe.data.sources.source import PREFERRED_SPLITS, UNLABELLED_TOO, Request, local_name, some
from headprobe.errors import UsageError

THE_FOLDER_ITSELF = "."  # for --data.split
WORDNET_ID = re.compile(r"n\d{8}(?![0-9A-Za-z])")


# `Training`, `test_set`, `fold_1`, `ILSVRC2012_img_val`, `seg_test`, `images`, `archive`: names without any class in.
_SPLIT = (
    r"train(ing)?|test(ing)?|val(id(ation)?)?|dev(elopment)?|eval(uation)?|holdout|fold|split|part(ition)?|subset|"
    r"pred(iction)?s?|unlabell?ed"
)
_AROUND = r"ilsvrc|imagenet|images?|imgs?|jpe?gs?|pngs?|photos?|pictures?|pics?|data(set)?s?|archives?|files?|folders?|"
_AROUND += r"seg|sets?|all|raw|full|extracted|sorted|cropped|resized|my|the|new|final|class(es)?|"
_AROUND += r"masks?|labels?|annotations?|groundtruths?|gts?|gallery|quer(y|ies)|probes?|hidden|public|private"
LONGEST_NAME = 40  # of letters: these patterns take long on long names
NO_CLASS = re.compile(rf"({_SPLIT}|{_AROUND})+")
NUMBERED_CLASS = re.compile(r"class[ _-]?\d+", re.IGNORECASE)  # as anonymous as it is, a class
HAS_SPLIT = re.compile(rf"({_AROUND})*({_SPLIT})({_SPLIT}|{_AROUND})*")


def choose_folder(request: Request, root: Path) -> str:
    """Return the name of the folder in `root` to score: the wanted split, else one of the usual names, else "".

    Raises:
        UsageError: The split is not there, or the usual one holds images without class folders while another has some.
    """
    there = subfolders(root)
    if request.split and request.split not in (*there, THE_FOLDER_ITSELF):
        choices = ", ".join(sorted(there)[:10]) or "it has no folders"
        raise UsageError(f"--data.split must be a folder in {local_name(root)} ({choices}), got {request.split}")
    if request.split:
        return request.split

    flat = ""
    for usual in PREFERRED_SPLITS:
        # `Val` and `TEST` too, yet the usual spelling first
        for name in sorted((name for name in there if name.lower() == usual), key=lambda name: name != usual):
            files = [] if there[name] else [entry.name for entry in entries(root / name)]
            if there[name] or subfolders(root / name) or any(map(files.count, METADATA_FILES)):
                if flat and request.labelled:
                    raise UsageError(
                        f"{local_name(root)} has the splits {flat} and {name}, and {flat} has no class folders: sort "
                        f"its images into folders named by their classes, or give --data.split {name}, got none"
                    )
                return name
            flat = flat or (name if any(no_image(file) is None for file in files) else "")
            if flat and not request.labelled:
                return flat
    return ""


def check_classes(listing: Listing, request: Request, root: Path, split: str) -> None:
    """Check that the folders of the first level may be classes.

    Args:
        listing: What lies below the folder of class folders; at least one image.
        request: What the user wants to open.
        root: `--data.path`.
        split: The folder in it that was listed, "" for itself.

    Raises:
        UsageError: They are splits, or a folder around the classes, or there are no class folders.
    """
    filled = {name: facts for name, facts in listing.folders.items() if facts.images}
    place = root / split
    described = sorted(name for name, facts in filled.items() if facts.metadata)
    if described:
        raise UsageError(
            f"{local_name(place)} holds folders that each describe their images by a file of metadata: "
            f"{_choose(root, split, described)}, got {_given(request)}"
        )
    if filled and all(map(WORDNET_ID.match, filled)):
        return
    if len(filled) > 1:
        _check_several(filled, request, root, split)
    else:
        _check_one(filled, listing, request, root, split)


def _check_one(filled: Mapping[str, FolderFacts], listing: Listing, request: Request, root: Path, split: str) -> None:
    """Check that the only folder with images is a class: that it is called like one and holds no classes."""
    place = root / split
    folders = {file.rpartition("/")[0] for file in listing.images}
    around = os.path.commonpath(folders) if folders else ""
    only, facts = next(iter(filled.items()), ("", FolderFacts()))
    if 2 * facts.direct < facts.images and len(folders) > 1:
        raise UsageError(
            f"{local_name(place)} holds one folder, {only}, and the classes seem to lie deeper: give --data.path "
            f"{place / around}, or {_itself(root, split)} if {only} is a class, got {_given(request)}"
        )
    if not filled or names_no_class(only):
        tables = sorted(name for name in listing.tables if name.lower().endswith(TABLES))
        named = f", or give --data.path {place / tables[0]} if that lists them" if tables else ""
        folder = f"one folder, {around}" if around else "one folder"
        raise UsageError(
            f"all images of {local_name(place)} lie in {folder}, so nothing says which class each is: sort them "
            "into folders named by their classes, or list them in a metadata.csv with the "
            f"columns file_name and label{named} ({UNLABELLED_TOO}), got {_given(request)}"
        )


def _check_several(filled: Mapping[str, FolderFacts], request: Request, root: Path, split: str) -> None:
    """Check that folders are no splits: most images lie deeper, and the folders' names or those below give it away."""
    deep = sorted(name for name, facts in filled.items() if 2 * facts.direct < facts.images)
    splits = [name for name in deep if names_no_class(name)]
    if not splits and all(map(names_no_class, filled)):
        splits = sorted(filled)  # without class folders in them

    places = Counter(chain.from_iterable({inner.lower() for inner in filled[name].inner} for name in deep))
    again = sorted(inner for inner, times in places.items() if times > 1)
    # One name alone, in every folder, is how Tiny-ImageNet and others keep the images of a class: CLASS/images/FILE.
    several = again and len(places) > 1
    if splits:
        why = f"{some(splits)} {'is no name of a class' if len(splits) == 1 else 'are no names of classes'}"
    elif several or any(map(WORDNET_ID.match, places)):
        splits = deep
        why = f"images lie deeper, and {some(again or sorted(places))} come again in several of them"
    else:
        return
    raise UsageError(
        f"{local_name(root / split)} seems to hold folders of splits, not of classes ({why}): "
        f"{_choose(root, split, splits)}, or {_itself(root, split)} if they are the classes, got {_given(request)}"
    )


def _choose(root: Path, split: str, names: Sequence[str]) -> str:
    """Return how to score one of several folders in the folder that was listed."""
    deeper = f"--data.path {root / split} and " if split else ""
    return f"give {deeper}--data.split one of them ({some(names)})"


def _itself(root: Path, split: str) -> str:
    """Return how to have the folders in the folder that was listed taken for classes."""
    deeper = f"--data.path {root / split} " if split else ""
    return f"{deeper}--data.split {THE_FOLDER_ITSELF}"


def _given(request: Request) -> str:
    return f"--data.split {request.split}" if request.split else request.shown


def names_split(name: str) -> bool:
    """Return whether a folder is called like a split: `Training`, `test_set`, `fold_1`."""
    return HAS_SPLIT.fullmatch(_letters(name)) is not None


def names_no_class(name: str) -> bool:
    """Return whether a folder's name says nothing of what is on its images."""
    return NO_CLASS.fullmatch(_letters(name)) is not None and NUMBERED_CLASS.fullmatch(name) is None


def _letters(name: str) -> str:
    letters = re.sub(r"[^a-z]", "", name.lower())
    return letters if len(letters) <= LONGEST_NAME else ""
