"""The clause for masks that come from a file: `file:PATH`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from headprobe.errors import UsageError
from headprobe.masks.clauses import Clause, Member, Model
from headprobe.masks.head_mask import HeadMask
from headprobe.masks.source import Piece


@dataclass(frozen=True)
class SavedMask(Clause):
    """`file:PATH`: a mask as `HeadMask.to_json` writes it, or a run's `masks.json` with exactly one mask."""

    path: Piece

    @property
    def text(self) -> str:
        """The path as written."""
        return f"file:{self.path.text}"

    def members(self, model: Model) -> Iterator[Member]:
        """Itself."""
        try:
            data = _the_mask(_read(Path(self.path.text)), self.path.text)
            mask = HeadMask.from_json(data, model.heads_per_layer, f"{self.path.text} for {model.name}")
        except UsageError as error:
            raise self.path.error(str(error)) from None
        yield Member(self, mask.masked)


def _read(path: Path) -> object:
    try:
        return json.loads(path.read_text("utf-8"), object_pairs_hook=_refuse_repeats)
    except OSError as error:
        raise UsageError(f"cannot read the mask: {error.strerror or error}; give a file, got {path}") from None
    except UsageError:
        raise
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or a number or nesting beyond reason
        raise UsageError(f"expected a mask as JSON, got {path}, which is not: {error}") from None


def _refuse_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """JSON lets a key stand twice, and Python keeps the last: half a mask would vanish."""
    data = dict(pairs)
    if len(data) < len(pairs):
        keys = [key for key, _ in pairs]
        raise UsageError(f"a key stands twice in the mask's JSON, got {next(k for k in keys if keys.count(k) > 1)!r}")
    return data


def _the_mask(data: object, where: str) -> object:
    """The data of the one mask of a `masks.json` (its baseline, `none`, aside), or the data as they are."""
    if not isinstance(data, Mapping) or "masked_heads" in data or not data:
        return data
    if not all(isinstance(entry, Mapping) and "masked_heads" in entry for entry in data.values()):
        return data
    names = [name for name in data if name != "none"]
    if len(names) != 1:
        few = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise UsageError(f"{where} holds {len(names)} masks: expected exactly one; write its name instead, got {few}")
    return data[names[0]]
