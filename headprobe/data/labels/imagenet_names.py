"""Which class of an ImageNet model a dataset's class name means: a WordNet id, or words that only one class has."""

import re
from collections.abc import Sequence
from typing import Any

from headprobe.data.labels.class_order import count_of, plain
from headprobe.data.sources.source import some
from headprobe.errors import UsageError
from headprobe.text import counted

WORDNET_ID = re.compile(r"(n\d{8})(?![0-9A-Za-z])")  # also `n02085620-Chihuahua`


# Share of a dataset's names that must be known, and in the model's order, before the unknown ones are taken to be too.
IN_PLACE = 0.5


class ImageNetNames:
    """The classes of a model that was trained on ImageNet or one of its larger lists.

    The number of classes decides which list it is, as in timm: 1000, 11221, 11821, 21841, 21842 or 21843. Names and
    descriptions are timm's, from WordNet.

    Args:
        subset: timm's name of the list.
    """

    def __init__(self, subset: str) -> None:
        from timm.data import ImageNetInfo  # timm costs seconds to import, `--help` does not need it

        info: Any = ImageNetInfo(subset)
        self.subset = subset
        self.ids: list[str] = info.label_names()
        self.descriptions: list[str] = info.label_descriptions()
        self._by_id = {name: number for number, name in enumerate(self.ids)}

        # Classes by each of their descriptions ("tench, Tinca tinca") as a whole, and between its commas.
        self._by_words: dict[str, set[int]] = {}
        for number, description in enumerate(self.descriptions):
            for words in (description, *description.split(",")):
                self._by_words.setdefault(plain(words), set()).add(number)

    def match(self, names: Sequence[str], remedy: str = "") -> list[int]:
        """Return the model class of each name; `remedy` is what messages offer besides a file.

        Where there are as many names as the model has classes, at least half of them are known, and all known ones are
        in the model's order, the others are taken to be so too: a few names in other words do not matter then.
        Otherwise every name must be known.

        Raises:
            UsageError: A name is not known, could be several classes, or means the class of another one.
        """
        ids = [WORDNET_ID.match(name) for name in names]
        if all(ids):
            return self._of_ids([found[1] for found in ids if found], names)

        possible = [self._possible(name) for name in names]
        if len(names) == len(self.ids) and _in_place(possible):
            return list(range(len(names)))
        _narrow(possible)
        self._check(names, possible, remedy)
        return [number for numbers in possible for number in numbers]

    def says(self, names: Sequence[str]) -> str:
        """Return how `match` finds these names, for the run's decisions."""
        if all(WORDNET_ID.match(name) for name in names):
            return "by WordNet id"
        unknown = [name for name in names if not self._possible(name)]
        others = f"; {counted(len(unknown), 'unknown name')} by position ({some(unknown)})" if unknown else ""
        return f"by ImageNet's WordNet ids and words{others}"

    def _of_ids(self, ids: Sequence[str], names: Sequence[str]) -> list[int]:
        """Return the model class of each WordNet id; `names` are for messages."""
        unknown = [name for name, id_ in zip(names, ids, strict=True) if id_ not in self._by_id]
        if unknown:
            raise UsageError(
                f"these WordNet ids are not among {self.subset.replace('imagenet', 'ImageNet')}'s classes: give "
                f"--data.class_map a file, got {some(unknown)}"
            )

        first: dict[str, str] = {}
        for name, id_ in zip(names, ids, strict=True):
            if id_ in first:
                raise UsageError(
                    f"two classes of the dataset have one WordNet id: give --data.class_map a file if they are the "
                    f"same, got {first[id_]} and {name}"
                )
            first[id_] = name
        return [self._by_id[id_] for id_ in ids]

    def _possible(self, name: str) -> set[int]:
        """Return every model class that a name may mean."""
        found = WORDNET_ID.match(name)
        if found:
            return {self._by_id[found[1]]} if found[1] in self._by_id else set()
        return set(self._by_words.get(plain(name), ()))

    def _check(self, names: Sequence[str], possible: Sequence[set[int]], remedy: str) -> None:
        """Check that each name means exactly one class, and no two names the same one."""
        taken: dict[int, str] = {}
        for position, (name, numbers) in enumerate(zip(names, possible, strict=True)):
            number = min(numbers, default=-1)
            if len(numbers) == 1 and number not in taken:
                taken[number] = name
                continue
            if not numbers:
                reason = f"{name!r} names none of the model's"
            elif len(numbers) > 1:
                meant = " or ".join(f"class {number} ({self.descriptions[number]})" for number in sorted(numbers)[:3])
                reason = f"{name!r} could be {meant}"
            else:
                reason = f"{taken[number]!r} and {name!r} both mean class {number} ({self.descriptions[number]})"
            raise UsageError(
                f"the dataset has {count_of(len(names))} and the model {len(self.ids)}: give --data.class_map "
                f"a file that says which is which{remedy}. By their "
                f"names they cannot all be told: class {position} of the dataset, {reason}; class {position} of the "
                f"model is {self.descriptions[position]!r}, got {some(names)}"
            )


def _in_place(possible: Sequence[set[int]]) -> bool:
    known = [position in numbers for position, numbers in enumerate(possible) if numbers]
    return all(known) and len(known) >= IN_PLACE * len(possible)


def _narrow(possible: Sequence[set[int]]) -> None:
    """Remove from names with several meanings every class that another name with a single meaning has, in rounds."""
    while True:
        sure = {number for numbers in possible if len(numbers) == 1 for number in numbers}
        several = [numbers for numbers in possible if len(numbers) > 1 and numbers & sure]
        if not several:
            return
        for numbers in several:
            numbers -= sure
