"""Which units a file of the ledger holds: neighbours that were added up, a node of the unit tree."""

import re
from pathlib import Path

from headprobe.metrics.unit_tree import Node

Span = tuple[int, int]
"""The first and the last unit of a file."""

_NAME = re.compile(r"units-(\d{5,})-(\d{5,})\.npz")


def unit_files(directory: Path) -> dict[Span, Path]:
    """Return the files of finished units."""
    found = ((_NAME.fullmatch(path.name), path) for path in directory.glob("units-*.npz"))
    return {(int(match[1]), int(match[2])): path for match, path in found if match}


def file_of(span: Span) -> str:
    """Return the name of the file of neighbouring units."""
    return f"units-{span[0]:05d}-{span[1]:05d}.npz"


def span_of(node: Node, units: int) -> Span:
    """Return the first and the last unit of a node of the unit tree."""
    level, index = node
    return index << level, min((index + 1) << level, units) - 1


def node_of(span: Span, units: int) -> Node:
    """Return the lowest node of the unit tree that holds exactly these units.

    Raises:
        ValueError: There is none.
    """
    level = max(0, (span[1] - span[0]).bit_length())
    node = level, span[0] >> level
    if span_of(node, units) != span:
        raise ValueError(f"units {span[0]} to {span[1]} are no node of {units} units")
    return node


def within(inner: Span, outer: Span) -> bool:
    """Say whether one file's units are a part of another's."""
    return inner != outer and outer[0] <= inner[0] and inner[1] <= outer[1]
