"""The page docs/models.md, which `headprobe models --markdown` prints."""

import re
import textwrap
from collections.abc import Sequence

from headprobe.catalog.families import FamilyTable
from headprobe.catalog.text import COLUMNS, MEANING, NUMERIC_COLUMNS, Notes, head_remarks, refusals, row, totals

COMMAND = "python -m headprobe models --markdown > docs/models.md"
SURVEY = "python -m headprobe models --survey --workers 2 --json"

INTRODUCTION = """\
# Which of timm's models have heads, and what can be measured of them

Made with timm {timm}. Do not edit this page: `{command}` writes it, from
`headprobe/catalog/families.json`, and `{survey}` prints that file.

{found}

Masking works on every head of every name counted under *masked*, and `python -m headprobe check NAME` proves it for a
model. Statistics differ: one is given where it means something and left empty elsewhere. *all* and *no* stand for all
layers of a timm family and for none, a percentage for a share of them. [What each head is like](describe_heads.md)
defines the statistics; [Which heads](heads.md) defines the kinds, what counts as a head, and what masking takes away
(`slot` or `attention`).

`python -m headprobe models FAMILY` prints all that is known of a timm family, `python -m headprobe models NAME` of one
model, and `python -m headprobe models --survey` walks the timm that is installed.
"""


FOUND = (
    "Every timm family (a module of `timm.models`) that has multi-head attention, found by building and running each "
    "of timm {timm}'s names once without weights. {totals}"
)


KINDS_OF_MAPS = """\
Attention maps are `weights` that sum to 1 over the keys of a query; `signed`, sums or differences of such weights that
may be negative; weights between `channels`; or `none`.
"""


def markdown_page(table: FamilyTable) -> str:
    """Return the page."""
    families = list(table.with_heads.values())
    notes = Notes.of(families)
    found = FOUND.format(timm=table.timm, totals=totals(table))
    parts = [
        INTRODUCTION.format(command=COMMAND, survey=SURVEY, timm=table.timm, found=textwrap.fill(found, width=120)),
        "## timm families\n",
        _table(COLUMNS, [row(family, notes) for family in families], NUMERIC_COLUMNS),
        *(f"- *{name}*: {_code(meaning)}" for name, meaning in MEANING.items()),
        "\n## Notes\n",
        *(f"{number}. {_code(note)}" for number, note in enumerate(notes.lines(), start=1)),
        "\n## Attention classes\n",
        KINDS_OF_MAPS,
        _classes(table),
        "## Refused\n",
        "A model is never run unmasked: names that have no heads to mask are refused with the reason.\n",
        *(f"- {refusal}" for refusal in refusals(table)),
    ]
    return "\n".join(parts) + "\n"


def _classes(table: FamilyTable) -> str:
    """Return the table of attention classes."""
    columns = ("class", "names", "layers", "kinds", "maps", "heads")
    rows = [
        (
            f"`{kind.removeprefix('timm.')}`",
            f"{one.names:,}",
            f"{one.tally.layers:,}",
            ", ".join(one.tally.kinds),
            ", ".join(one.tally.maps),
            "; ".join(head_remarks(one.tally)),
        )
        for kind, one in table.classes.items()
    ]
    return _table(columns, rows, ("names", "layers"))


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[str]) -> str:
    """Return a markdown table, columns of numbers aligned to the right."""
    rule = ["---:" if name in numbers else "---" for name in columns]
    return "\n".join(f"| {' | '.join(cells)} |".replace("  |", " |") for cells in (columns, rule, *rows)) + "\n"


def _code(text: str) -> str:
    """Mark the names of statistics, the only words with underscores, as code."""
    return re.sub(r"\b[a-z]+(_[a-z]+)+\b", r"`\g<0>`", text)
