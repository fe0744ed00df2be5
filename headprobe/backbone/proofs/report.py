"""The result of a check: verdicts by layer, as a table to read and as plain data for machines."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from headprobe.backbone.heads.layout import AttentionLayer
from headprobe.text import counted, ranges

PROOFS = ("keep", "operator", "columns", "effect", "once", "rows", "join", "map")
"""In the order of the table; docs/heads.md has what each proves."""


MARKS = {True: "ok", False: "FAIL", None: "-"}


@dataclass(frozen=True)
class Verdict:
    """The result of one proof of one layer.

    Attributes:
        passed: None where the proof does not apply.
        detail: The size of the difference, the heads concerned, or why the proof does not apply.
    """

    passed: bool | None
    detail: str = ""


@dataclass
class LayerReport:
    """One attention layer and its proofs.

    Attributes:
        layer: The layer.
        proofs: Verdicts by name, in the order of `PROOFS`.
        join: Qualified name of the module where its masks join the growing pass, at its input; empty for the whole
            model, None where they cannot join.
        silent: Heads with a projection of zeros: masking them changes nothing.
    """

    layer: AttentionLayer
    proofs: dict[str, Verdict] = field(default_factory=dict)
    join: str | None = None
    silent: list[int] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether no proof failed."""
        return all(verdict.passed is not False for verdict in self.proofs.values())


@dataclass(frozen=True)
class CheckReport:
    """The result of `check` on a model.

    Attributes:
        model: Its name.
        input_size: `(channels, height, width)` of the images it was tried on.
        layers: A report per attention layer, in execution order.
        notes: What a user should know beside the proofs.
    """

    model: str
    input_size: tuple[int, int, int]
    layers: tuple[LayerReport, ...]
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every proof of every layer passed."""
        return all(report.passed for report in self.layers)

    def __str__(self) -> str:
        """Return the table that `python -m headprobe check` prints."""
        return report_text(self)

    @property
    def failures(self) -> list[str]:
        """One line per failed proof: layer, proof, detail."""
        return [
            f"{report.layer.name}: {name}: {verdict.detail}"
            for report in self.layers
            for name, verdict in report.proofs.items()
            if verdict.passed is False
        ]


def report_text(report: CheckReport) -> str:
    """Return the report as lines of text: a row per layer, then what failed, what does not apply, and notes."""
    heads = sum(entry.layer.heads for entry in report.layers)
    size = " x ".join(map(str, report.input_size))
    lines = [f"{report.model} ({size}): {counted(len(report.layers), 'layer')}, {counted(heads, 'head')}", ""]
    lines += _table(report.layers)
    lines += ["", *(f"FAIL  {failure}" for failure in report.failures)]
    lines += [f"-  {text}" for text in _not_applicable(report.layers)]
    lines += [f"*  {note}" for note in report.notes]
    failed = len(report.failures)
    lines.append(
        "every proof passed: masks take effect, on the heads that they name"
        if report.passed
        else f"{counted(failed, 'proof')} failed: this model must not be run under masks"
    )
    return "\n".join(lines) + "\n"


def report_data(report: CheckReport) -> dict[str, Any]:
    """Return the report as plain data."""
    return {
        "model": report.model,
        "input_size": list(report.input_size),
        "passed": report.passed,
        "notes": list(report.notes),
        "layers": [_layer_data(number, entry) for number, entry in enumerate(report.layers)],
    }


def _layer_data(number: int, entry: LayerReport) -> dict[str, Any]:
    layer = entry.layer
    return {
        "layer": number,
        "module": layer.name,
        "class": layer.attention_class,
        "known": layer.known,
        "heads": layer.heads,
        "head_dim": layer.head_dim,
        "kind": layer.kind,
        "maps": layer.site.maps,
        "masked_at": "operator" if layer.masked_at_operator else layer.point,
        "joins_at": entry.join,
        "silent_heads": entry.silent,
        "proofs": {name: {"passed": v.passed, "detail": v.detail} for name, v in entry.proofs.items()},
    }


def _table(layers: Sequence[LayerReport]) -> list[str]:
    """Lay out a row per layer, columns as wide as they must be."""
    heading = ("layer", "module", "heads", "dim", "kind", "masked at", "joins at", *PROOFS)
    rows = [heading, *(_row(number, entry) for number, entry in enumerate(layers))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heading))]
    numbers = ("layer", "heads", "dim")

    lines = []
    for row in rows:
        cells = [_cell(text, width, name in numbers) for text, width, name in zip(row, widths, heading, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def _cell(text: str, width: int, number: bool) -> str:
    return text.rjust(width) if number else text.ljust(width)


def _row(number: int, entry: LayerReport) -> tuple[str, ...]:
    layer = entry.layer
    masked = "operator" if layer.masked_at_operator else layer.point.removeprefix(layer.name)
    joins = "nowhere" if entry.join is None else entry.join or "whole model"
    marks = (MARKS[entry.proofs[name].passed] for name in PROOFS)
    return (str(number), layer.name, str(layer.heads), str(layer.head_dim), layer.kind, masked, joins, *marks)


def _not_applicable(layers: Sequence[LayerReport]) -> list[str]:
    """Return a line for each reason: which proof, in which layers, why it does not apply."""
    reasons: dict[tuple[str, str], list[int]] = {}
    for number, entry in enumerate(layers):
        for name, verdict in entry.proofs.items():
            if verdict.passed is None:
                reasons.setdefault((name, verdict.detail), []).append(number)
    return [f"{name}, layers {ranges(numbers)}: {why}" for (name, why), numbers in reasons.items()]
