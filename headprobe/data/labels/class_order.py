"""Which order names of classes stand in: that of characters, or timm's; and names that are found among others."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from itertools import pairwise

from headprobe.text import counted

ORDERS_OF = {"sorted": "the order of characters (torchvision, Keras, datasets)", "natural": "timm's natural order"}
"""The orders that class folders are numbered in, by the word of `--data.class_map` that chooses them."""


def in_order(names: Sequence[str], order: str) -> list[str]:
    """Return names in one of `ORDERS_OF`; names that timm does not tell apart stand in the order of characters."""
    by_characters = sorted(names)
    return by_characters if order == "sorted" else sorted(by_characters, key=natural_key)


def natural_key(name: str) -> list[str | int]:
    """Return timm's key for class folders: digits count as numbers, capitals as small letters.

    That of `timm.utils.misc.natural_key`, which fails at names such as `²`.
    """
    parts = re.split(r"(\d+)", name.lower())  # text and digits in turn
    return [int(part) if place % 2 else part for place, part in enumerate(parts)]


def order_in_doubt(names: Sequence[str]) -> str:
    """Return where the two orders of these names differ, in words; empty where they are the same."""
    if open_to_timm := _same_to_timm(names):
        first, second = open_to_timm
        return f"timm's natural order leaves open which of {first!r} and {second!r} comes first"
    pairs = zip(in_order(names, "sorted"), in_order(names, "natural"), strict=True)
    for number, (by_characters, natural) in enumerate(pairs):
        if by_characters != natural:
            return (
                f"class {number} is {by_characters!r} in {ORDERS_OF['sorted']} and {natural!r} in "
                f"{ORDERS_OF['natural']}"
            )
    return ""


def _same_to_timm(names: Sequence[str]) -> tuple[str, str] | None:
    """Return two names with the same natural key: timm numbers them in the order of a set, which changes by process."""
    ordered = in_order(names, "natural")
    for first, second in pairwise(ordered):
        if natural_key(first) == natural_key(second):
            return first, second
    return None


def count_of(classes: int) -> str:
    """Return `1 class` or `1000 classes`: without the commas of `counted`, as other numbers of classes are shown."""
    return counted(classes, "class").replace(",", "")


# -- names among names -------------------------------------------------------------------------------------------------


def composed(name: str) -> str:
    """Return a name with its accents composed: names of files on a Mac have them apart, lists have them composed."""
    return unicodedata.normalize("NFC", name)


def plain(words: str) -> str:
    """Return words in lower case, with single spaces for underscores and hyphens."""
    return " ".join(words.lower().replace("_", " ").replace("-", " ").split())


def places_of(names: Sequence[str], among: Sequence[str]) -> list[int | None]:
    """Return the place of each name among others, None where it has none.

    As they are written, or else in `plain` words where all names have a place and no two the same one.
    """
    exact = _found(names, {composed(other): place for place, other in enumerate(among) if other})
    if None not in exact:
        return exact
    places = {plain(other): place for place, other in enumerate(among) if other}
    if len(places) < sum(map(bool, among)):  # two of them are the same in plain words
        return exact
    loose = _found([plain(name) for name in names], places)
    return exact if None in loose or len(set(loose)) < len(loose) else loose


def plain_places(places: Mapping[str, int]) -> dict[str, int]:
    """Return places by `plain` name, for names that are not found as written; empty where two are then the same."""
    found = {plain(composed(name)): place for name, place in places.items()}
    return found if len(found) == len(places) else {}


def _found(names: Sequence[str], places: Mapping[str, int]) -> list[int | None]:
    return [places.get(composed(name)) for name in names]
