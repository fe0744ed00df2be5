"""A section of the page: what it says of itself, and the data that its drawing needs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Section:
    """A figure of the page with its texts, ready to be written.

    Attributes:
        key: Its name: the anchor in the page, the name of saved files, and of `assets/KEY.js`, which draws it.
        title: Its heading.
        short: What the bar on top calls it; its heading where it has no such name.
        look_at: One sentence: what to look at.
        definition: One sentence: how what is shown is defined.
        link: Where the docs of this version define it, such as `results.md#curvescsv`.
        data: What its drawing gets: numbers, texts, lists, dicts and numpy arrays. Floats are rounded to five
            significant digits, NaN becomes null, and arrays of uint8 travel as bytes (`page.bytes` in the drawing).
        table: Columns and their values, for the button that saves a CSV file; none has no button.
        sources: Names of the files that it was made from.
        scripts: Names of further files in `assets/` that its drawing needs, without `.js`.
    """

    key: str
    title: str
    look_at: str
    definition: str
    link: str
    data: Any
    table: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    sources: Sequence[str] = ()
    scripts: Sequence[str] = ()
    short: str = ""
