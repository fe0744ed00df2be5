"""The tables of architectures as text and as the page docs/models.md."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from headprobe.backbone.families import Family, FamilyTable, ModelRecord, Tally

STATISTICS: Mapping[str, str] = {
    "keys": "entropy_all_keys_nats",
    "patches": "entropy_nats",
    "place": "attention_distance_px",
    "value": "value_weighted_attention",
    "norm": "output_norm_ratio",
    "spec": "spectrum",
    "contr": "contribution_spectrum",
}
"""Columns of the table, and the statistic that stands for each."""

COLUMNS = ("family", "masked", "layers", "kinds", "maps", *STATISTICS, "notes")

MEANING = (
    ("masked", "names whose every head can be masked, of all names of the family"),
    ("layers", "attention layers of those names"),
    ("kinds", "what a query attends to"),
    ("maps", "layers with an attention map of each head"),
    ("keys", "layers with entropy_all_keys_nats and sink_mass: weights that are shares of 1"),
    ("patches", "layers with entropy_nats, confidence, self_mass and mutual_information: keys and queries are patches"),
    ("place", "layers with attention distances and offset maps: the patches' places on the image are known"),
    ("value", "layers with value_weighted_attention"),
    ("norm", "layers with output_norm_ratio"),
    ("spec", "layers with spectra of the heads' outputs"),
    ("contr", "layers with spectra of what heads add to the residual stream"),
    ("notes", "what a head is, and why something is missing, as numbered below"),
)
"""What the columns hold."""


@dataclass(frozen=True)
class Notes:
    """The numbered remarks of a table.

    Attributes:
        numbers: Number of each remark, from 1.
        columns: Columns that each remark explains; none for what a head is.
    """

    numbers: Mapping[str, int]
    columns: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, tallies: Iterable[Tally]) -> "Notes":
        """Number the remarks on some layers: first what a head is, then why statistics are missing."""
        several = list(tallies)
        columns: dict[str, dict[str, None]] = {}
        for tally in several:
            for remark in (*tally.head_is, *tally.beside):
                columns.setdefault(_head_remark(tally, remark), {})
        for column, statistic in STATISTICS.items():
            for tally in several:
                for why in tally.undefined.get(statistic, {}):
                    columns.setdefault(why, {})[column] = None
        numbers = {remark: number for number, remark in enumerate(columns, start=1)}
        return cls(numbers, {remark: tuple(names) for remark, names in columns.items()})

    def on(self, tally: Tally) -> str:
        """Return the numbers of the remarks on some layers."""
        remarks = [_head_remark(tally, remark) for remark in (*tally.head_is, *tally.beside)]
        remarks += [why for statistic in STATISTICS.values() for why in tally.undefined.get(statistic, {})]
        return ",".join(str(number) for number in sorted({self.numbers[remark] for remark in remarks}))

    def lines(self) -> list[str]:
        """Return every remark with what it explains."""
        return [
            f"{remark} ({', '.join(self.columns[remark])})" if self.columns[remark] else remark
            for remark in self.numbers
        ]


def _head_remark(tally: Tally, remark: str) -> str:
    return f"a head is {remark}" if remark in tally.head_is else remark


def table_text(table: FamilyTable, names: Sequence[str] = ()) -> str:
    """Return the table of families for a terminal of 120 columns.

    Args:
        table: The families.
        names: Names of models to list below it.
    """
    families = table.with_heads
    notes = Notes.of(family.tally for family in families.values())
    lines: list[str] = []
    if families:
        rows = [COLUMNS, *(_row(family, notes) for family in families.values())]
        lines += [*_aligned(rows), "", _totals(table), "all, no, or the share of the layers:"]
        lines += [f"  {name:8} {meaning}" for name, meaning in MEANING]
        lines += ["", "notes:", *(f"{number:4}  {line}" for number, line in enumerate(notes.lines(), start=1)), ""]
    for reason, by_family in table.refused.items():
        refused = ", ".join(f"{family} {len(one)}" for family, one in by_family.items())
        lines += _wrapped(f"refused, {reason} ({sum(map(len, by_family.values())):,} names): {refused}")
    if names:
        lines += ["", *_wrapped(f"names that fit ({len(names):,}): {', '.join(names)}")]
    return "\n".join(lines) + "\n"


def _row(family: Family, notes: Notes) -> tuple[str, ...]:
    tally = family.tally
    return (
        family.name,
        f"{len(family.models)}/{len(family.names)}",
        f"{tally.layers:,}",
        ", ".join(sorted(tally.kinds, key=lambda kind: -tally.kinds[kind])),
        _share(tally.with_maps, tally.layers),
        *(_share(tally.defined(statistic), tally.layers) for statistic in STATISTICS.values()),
        notes.on(tally),
    )


def _share(part: int, whole: int) -> str:
    """Return `all`, `no`, or the share in percent, never rounded to 0 or 100."""
    if part in (0, whole):
        return "all" if part else "no"
    return f"{min(max(round(100 * part / whole), 1), 99)}%"


def _totals(table: FamilyTable) -> str:
    families = table.with_heads.values()
    total, classes = Tally.total(family.tally for family in families), len(table.classes)
    return (
        f"{sum(len(family.models) for family in families):,} names of {len(families)} families have "
        f"{total.heads:,} heads in {total.layers:,} layers of {classes} attention classes; "
        f"{sum(family.mapped for family in families):,} names have maps in every layer"
    )


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines, their columns left-aligned, but numbers of names and layers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    right = {COLUMNS.index("masked"), COLUMNS.index("layers")}
    return [
        "  ".join(cell.rjust(width) if at in right else cell.ljust(width) for at, (cell, width) in enumerate(
            zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]  # fmt: skip


def _wrapped(text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width=118, subsequent_indent="  ", break_on_hyphens=False)
