"""The table of timm families as text: its rows, its numbered notes, and one timm family or model in full."""

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from headprobe.catalog.families import ClassTally, Family, FamilyTable, ModelRecord, Tally
from headprobe.text import counted, ranges

STATISTIC_OF_COLUMN: Mapping[str, str] = {
    "keys": "entropy_all_keys_nats",
    "patch": "entropy_nats",
    "place": "attention_distance_px",
    "value": "value_weighted_attention",
    "norm": "output_norm_ratio",
    "spec": "spectrum",
    "adds": "contribution_spectrum",
}
"""Columns that stand for one or several statistics, and the statistic that decides for all of them."""


COLUMNS = ("timm family", "masked", "layers", "kinds", "maps", *STATISTIC_OF_COLUMN, "notes")


NUMERIC_COLUMNS = ("masked", "layers")


MEANING: Mapping[str, str] = {
    "masked": "names in which every head can be masked, of all names of the timm family",
    "layers": "attention layers of those names",
    "kinds": "what a query attends to",
    "maps": "layers that have an attention map for each head",
    "keys": "layers with entropy_all_keys_nats and sink_mass: the map is weights that sum to 1",
    "patch": "layers with entropy_nats, confidence, self_mass and mutual_information: which patches attend is known",
    "place": "layers with attention distances and offset maps: the patches' places on the image are known",
    "value": "layers with value_weighted_attention",
    "norm": "layers with output_norm_ratio",
    "spec": "layers with spectra of the heads' outputs",
    "adds": "layers with spectra of what the heads add to the residual stream",
    "notes": "what a head is, and why something is missing: the numbers below",
}
"""What the columns hold."""


MAPS_IN_WORDS: Mapping[str, str] = {
    "weights": "maps of weights",
    "signed": "signed maps",
    "channels": "maps of channels",
    "none": "no maps",
}


WIDTH = 118  # characters of a line


@dataclass(frozen=True)
class Notes:
    """The numbered remarks of a table.

    Attributes:
        columns: Every remark in the order of its number, from 1, with the columns that it explains.
    """

    columns: Mapping[str, Sequence[str]]

    @classmethod
    def of(cls, families: Iterable[Family]) -> "Notes":
        """Number the remarks on timm families: first what a head is, then why statistics are missing."""
        order = ["", *STATISTIC_OF_COLUMN]  # remarks on what a head is have no column
        remarks = [remark for family in families for remark in _remarks(family)]
        remarks.sort(key=lambda remark: order.index(remark[1]))

        found: dict[str, dict[str, None]] = {}
        for text, column in remarks:
            found.setdefault(text, {})[column] = None
        return cls({text: tuple(filter(None, columns)) for text, columns in found.items()})

    def on(self, family: Family) -> str:
        """Return the numbers of the remarks on a timm family."""
        own = {remark for remark, _ in _remarks(family)}
        return ranges([number for number, remark in enumerate(self.columns, start=1) if remark in own])

    def lines(self) -> list[str]:
        """Return every remark with the columns that it explains."""
        return [f"{remark} ({', '.join(columns)})" if columns else remark for remark, columns in self.columns.items()]


def _remarks(family: Family) -> Iterator[tuple[str, str]]:
    """Yield the remarks on a timm family, each with the column that it explains; empty for what a head is."""
    tally = family.tally
    yield from ((remark, "") for remark in head_remarks(tally))
    if family.headless:
        yield "further modules compute attention without heads, which no mask reaches", ""
    for column, statistic in STATISTIC_OF_COLUMN.items():
        yield from ((why, column) for why in tally.undefined.get(statistic, {}))


def head_remarks(tally: Tally) -> list[str]:
    """Return the remarks on the heads of some layers."""
    remarks = [f"a head is {what}" for what in tally.head_is]
    remarks += tally.beside
    if tally.one_head:
        remarks.append("some layers have one head alone: masking it masks the layer")
    return remarks


def row(family: Family, notes: Notes) -> tuple[str, ...]:
    """Return the row of a timm family in the table."""
    tally = family.tally
    return (
        family.name,
        f"{len(family.models)}/{len(family.names)}",
        f"{tally.layers:,}",
        ",".join(sorted(tally.kinds, key=lambda kind: -tally.kinds[kind])),
        _share(tally.with_maps, tally.layers),
        *(_share(tally.defined(statistic), tally.layers) for statistic in STATISTIC_OF_COLUMN.values()),
        notes.on(family),
    )


def _share(part: int, whole: int) -> str:
    """Return `all`, `no`, or the share in percent, never rounded to 0 or 100."""
    if part in (0, whole):
        return "all" if part else "no"
    return f"{min(max(round(100 * part / whole), 1), 99)}%"


def totals(table: FamilyTable) -> str:
    """Return the totals of a table as one sentence."""
    families = table.with_heads.values()
    total = Tally.total(family.tally for family in families)
    return (
        f"{sum(len(family.models) for family in families):,} names of {counted(len(families), 'timm family')} have "
        f"{total.heads:,} heads in {total.layers:,} layers of {counted(len(table.classes), 'attention class')}; "
        f"{sum(family.mapped for family in families):,} of the names have maps in every layer."
    )


def refusals(table: FamilyTable) -> list[str]:
    """Return a line for every reason: how many names of which timm families are refused."""
    lines = []
    for reason, by_family in table.refused.items():
        names = sum(map(len, by_family.values()))
        counts = ", ".join(f"{family} {len(found)}" for family, found in by_family.items())
        lines.append(f"{counted(names, 'name')}, {reason}: {counts}")
    return lines


def table_text(table: FamilyTable, names: Sequence[str] = ()) -> str:
    """Return the table of timm families for a terminal of 120 columns.

    Args:
        table: The timm families.
        names: Names of models to list below it.
    """
    families = list(table.with_heads.values())
    notes = Notes.of(families)
    lines: list[str] = []
    if families:
        lines += [*_aligned([COLUMNS, *(row(family, notes) for family in families)]), "", *_wrapped(totals(table))]
        lines += ["", "Columns (all layers, none, or their share):"]
        lines += [f"  {name:8} {meaning}" for name, meaning in MEANING.items()]
        lines += ["", "Notes:"] if notes.columns else []
        for number, note in enumerate(notes.lines(), start=1):
            lines += _wrapped(f"{number:4}  {note}")

    if table.refused:
        lines += ["", "Refused:"]
        for refusal in refusals(table):
            lines += _wrapped(f"  {refusal}")

    if names:
        lines += ["", *_wrapped(f"Names that fit ({len(names):,}): {', '.join(names)}")]
    return "\n".join(lines).lstrip("\n") + "\n"


def family_text(family: Family) -> str:
    """Return all that is known of a timm family."""
    lines = [f"timm.models.{family.name}: {len(family.models)} of {counted(len(family.names), 'name')} with heads"]
    if family.models:
        lines += _described(family.tally, family.classes, family.headless)
        lines += ["", "Names (layers, heads):"]
        lines += _wrapped("  " + ", ".join(f"{name} ({a}, {b:,})" for name, (a, b) in family.models.items()))
    for reason, names in family.refused.items():
        lines += ["", *_wrapped(f"Refused, {reason} ({len(names)}): {', '.join(names)}")]
    return "\n".join(lines) + "\n"


def record_text(record: ModelRecord) -> str:
    """Return all that is known of one model."""
    if record.refused:
        return f"{record.name} (timm.models.{record.family}): refused, {record.refused}\n"
    classes = {kind: ClassTally(1, tally) for kind, tally in record.classes.items()}
    lines = [f"{record.name} (timm.models.{record.family})", *_described(record.tally, classes, record.headless)]
    return "\n".join(lines) + "\n"


def _described(tally: Tally, classes: Mapping[str, ClassTally], headless: int) -> list[str]:
    """Return lines on the layers by attention class, and on the statistics that they have."""
    lines = ["", f"Layers: {tally.layers:,} with {counted(tally.heads, 'head')}"]
    for kind, one in classes.items():
        kinds = ", ".join(f"{count:,} {name}" for name, count in one.tally.kinds.items())
        maps = ", ".join(MAPS_IN_WORDS[name] for name in one.tally.maps)
        lines += _wrapped(f"  {kind}: {kinds}; " + "; ".join([maps, *head_remarks(one.tally)]))
    if headless:
        lines += [f"  {counted(headless, 'further module')}: attention without heads, which no mask reaches"]

    lines += ["", "Statistics, of so many layers:"]
    alike: dict[str, list[str]] = {}
    for statistic in tally.undefined:
        whys = "; ".join(f"not in {count:,}: {why}" for why, count in tally.undefined[statistic].items())
        alike.setdefault(f"{_share(tally.defined(statistic), tally.layers)} ({whys})", []).append(statistic)
    for share, statistics in alike.items():
        lines += _wrapped(f"  {', '.join(statistics)}: {share}")
    return [*lines, "  all others: all" if alike else "  every statistic: all"]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines, columns of numbers aligned to the right."""
    widths = [max(len(line[column]) for line in rows) for column in range(len(COLUMNS))]
    lines = []
    for line in rows:
        cells = zip(COLUMNS, line, widths, strict=True)
        aligned = [cell.rjust(width) if name in NUMERIC_COLUMNS else cell.ljust(width) for name, cell, width in cells]

        # Two spaces around the kinds and the notes, one between all others.
        narrow, shares = COLUMNS.index("kinds"), COLUMNS.index("maps")
        parts = [aligned[:narrow], aligned[narrow:shares], aligned[shares:-1], aligned[-1:]]
        lines.append("  ".join(" ".join(part) for part in parts).rstrip())
    return lines


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, width=WIDTH, subsequent_indent="      ", break_on_hyphens=False)
