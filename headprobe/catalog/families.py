"""The table of timm families (modules of `timm.models`): which have heads, and which statistics; read without torch."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import resources
from typing import Any, Self

FILE = "families.json"
"""The table that ships with headprobe, beside this module."""


NO_HEADS = "no attention heads"
"""Why a model without any attention that has heads is refused."""


@dataclass(frozen=True)
class Tally:
    """Counts over some attention layers.

    Attributes:
        layers: Number of layers.
        heads: Number of heads.
        one_head: Layers that have one head alone.
        kinds: Layers by what a query attends to.
        maps: Layers by what their attention map is (`Maps` of `headprobe.backbone.heads.sites`).
        head_is: Layers by what counts as one head, where that is not plain.
        beside: Layers by what else masking a head's slot takes away, beside what the head attended to.
        undefined: For each statistic, the layers that do not have it, by reason; all others have it.
    """

    layers: int = 0
    heads: int = 0
    one_head: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    maps: dict[str, int] = field(default_factory=dict)
    head_is: dict[str, int] = field(default_factory=dict)
    beside: dict[str, int] = field(default_factory=dict)
    undefined: dict[str, dict[str, int]] = field(default_factory=dict)

    def defined(self, statistic: str) -> int:
        """Return how many layers have a statistic."""
        return self.layers - sum(self.undefined.get(statistic, {}).values())

    @property
    def with_maps(self) -> int:
        """Layers that have an attention map of any kind."""
        return self.layers - self.maps.get("none", 0)

    @classmethod
    def total(cls, tallies: Iterable["Tally"]) -> "Tally":
        """Return the sum of several."""
        several = list(tallies)
        statistics = dict.fromkeys(name for one in several for name in one.undefined)
        return cls(
            layers=sum(one.layers for one in several),
            heads=sum(one.heads for one in several),
            one_head=sum(one.one_head for one in several),
            kinds=_sum(one.kinds for one in several),
            maps=_sum(one.maps for one in several),
            head_is=_sum(one.head_is for one in several),
            beside=_sum(one.beside for one in several),
            undefined={name: _sum(one.undefined.get(name, {}) for one in several) for name in statistics},
        )


def _sum(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for one in counts:
        total.update(one)
    return dict(total)


@dataclass(frozen=True)
class ModelRecord:
    """What is known of one of timm's models.

    Attributes:
        name: timm's name of it.
        family: Its timm family: the module `timm.models.<family>`.
        classes: Its layers, by attention class; empty where it is refused.
        headless: Further modules that compute attention without heads, which no mask reaches.
        refused: Why headprobe refuses it, empty where it does not.
    """

    name: str
    family: str
    classes: dict[str, Tally] = field(default_factory=dict)
    headless: int = 0
    refused: str = ""

    @property
    def tally(self) -> Tally:
        """All its layers."""
        return Tally.total(self.classes.values())


@dataclass(frozen=True)
class ClassTally:
    """One attention class within a timm family.

    Attributes:
        names: How many models have it.
        tally: Their layers of that class.
    """

    names: int
    tally: Tally


@dataclass(frozen=True)
class Family:
    """A timm family: all names of one module of `timm.models`.

    Attributes:
        name: The module, without `timm.models.`.
        models: Layers and heads of each name that has heads.
        refused: Names that are refused, by reason.
        mapped: How many names have an attention map of any kind in every layer.
        headless: Further modules of all names that compute attention without heads, which no mask reaches.
        classes: The layers of all names, by attention class.
    """

    name: str
    models: dict[str, tuple[int, int]]
    refused: dict[str, list[str]]
    mapped: int
    headless: int
    classes: dict[str, ClassTally]

    @property
    def tally(self) -> Tally:
        """All layers of all its names."""
        return Tally.total(one.tally for one in self.classes.values())

    @property
    def names(self) -> list[str]:
        """All its names, those with heads first."""
        return [*self.models, *(name for names in self.refused.values() for name in names)]

    @classmethod
    def of(cls, name: str, records: Iterable[ModelRecord]) -> Self:
        """Add up the records of a timm family."""
        several = list(records)
        supported = [record for record in several if not record.refused]
        refused: dict[str, list[str]] = {}
        for record in several:
            if record.refused:
                refused.setdefault(record.refused, []).append(record.name)

        classes = {}
        for kind in sorted({kind for record in supported for kind in record.classes}):
            having = [record.classes[kind] for record in supported if kind in record.classes]
            classes[kind] = ClassTally(len(having), Tally.total(having))

        tallies = {record.name: record.tally for record in supported}
        models = {name: (tally.layers, tally.heads) for name, tally in tallies.items()}
        mapped = sum(tally.with_maps == tally.layers for tally in tallies.values())
        return cls(name, models, refused, mapped, sum(record.headless for record in several), classes)


@dataclass(frozen=True)
class FamilyTable:
    """All timm families of one release of timm.

    Attributes:
        timm: The release.
        families: By name, in alphabetical order.
    """

    timm: str
    families: dict[str, Family]

    @classmethod
    def of(cls, timm: str, records: Iterable[ModelRecord]) -> Self:
        """Sort records into families."""
        by_family: dict[str, list[ModelRecord]] = {}
        for record in records:
            by_family.setdefault(record.family, []).append(record)
        return cls(timm, {name: Family.of(name, by_family[name]) for name in sorted(by_family)})

    @property
    def with_heads(self) -> dict[str, Family]:
        """Families that have a name with heads."""
        return {name: family for name, family in self.families.items() if family.models}

    @property
    def classes(self) -> dict[str, ClassTally]:
        """Attention classes over all timm families."""
        found: dict[str, list[ClassTally]] = {}
        for family in self.families.values():
            for kind, one in family.classes.items():
                found.setdefault(kind, []).append(one)

        total = {}
        for kind in sorted(found):
            names = sum(one.names for one in found[kind])
            total[kind] = ClassTally(names, Tally.total(one.tally for one in found[kind]))
        return total

    @property
    def refused(self) -> dict[str, dict[str, list[str]]]:
        """Names that are refused, by reason and timm family."""
        found: dict[str, dict[str, list[str]]] = {}
        for family in self.families.values():
            for reason, names in family.refused.items():
                found.setdefault(reason, {})[family.name] = names
        return found

    def to_json(self) -> str:
        """Return the table as JSON with one line per family."""
        lines = []
        for name, family in self.families.items():
            entry = asdict(family)
            del entry["name"]  # the key says it
            lines.append(f"  {json.dumps(name)}: {json.dumps(entry)}")
        return f'{{"timm": {json.dumps(self.timm)}, "families": {{\n' + ",\n".join(lines) + "\n}}\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote."""
        read = json.loads(text)
        return cls(read["timm"], {name: _family(name, entry) for name, entry in read["families"].items()})


def _family(name: str, entry: Mapping[str, Any]) -> Family:
    models = {model: (int(layers), int(heads)) for model, (layers, heads) in entry["models"].items()}
    classes = {kind: ClassTally(one["names"], Tally(**one["tally"])) for kind, one in entry["classes"].items()}
    return Family(name, models, entry["refused"], entry["mapped"], entry["headless"], classes)


def shipped_families() -> FamilyTable:
    """Read the table that ships with headprobe."""
    return FamilyTable.from_json(resources.files("headprobe.catalog").joinpath(FILE).read_text(encoding="utf-8"))
