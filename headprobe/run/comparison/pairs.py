"""Which two runs can be compared, in which masks, and whether they judged the very same images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from headprobe.errors import UsageError
from headprobe.masks.ablations import FITTED
from headprobe.metrics.arrays import FloatArray, IntArray
from headprobe.run.ablations import DROP_PP, NLL_RISE, rises_and_drops
from headprobe.run.comparison.differences import differences, not_the_same_rows
from headprobe.run.load import Row, RunFiles
from headprobe.text import counted

FEATURES = ("feature_distance", "feature_cosine")

LIMITS: dict[str, tuple[str, str]] = {
    NLL_RISE: ("nll_rise_low", "nll_rise_high"),
    DROP_PP: ("drop_low_pp", "drop_high_pp"),
    **{name: (f"{name}_low", f"{name}_high") for name in FEATURES},
}
"""What is compared, by its column of `masks.csv`, with the columns of its limits; the first resolves most."""

PAIRED, TWO_SAMPLE = "paired", "two-sample"

Key = tuple[str, str]
"""A mask and its ablation."""


@dataclass(frozen=True)
class Measured:
    """What a run measured, as a comparison needs it.

    Attributes:
        run: Its files.
        name: What the comparison calls it.
        images: Images that could be read of each group, `[groups]`.
        counted: By quantity the images of each group that its sums are over, `[groups]`.
        sums: By quantity its sums over the images of each group, `[rows of masks.csv, groups]`; of quantities that
            the run has in `masks.csv` but not by group there are none.
        places: The rows of `masks.csv` of each mask under an ablation: one, or as many as draws.
    """

    run: RunFiles
    name: str
    images: IntArray
    counted: dict[str, IntArray]
    sums: dict[str, FloatArray]
    places: dict[Key, list[int]]

    @property
    def quantities(self) -> list[str]:
        """The quantities that the run has: without labels only those of features."""
        rows = self.run.masks
        return [name for name in LIMITS if name in rows[0] and any(np.isfinite(float(row[name])) for row in rows[1:])]

    def sums_of(self, keys: Sequence[Key], quantity: str) -> FloatArray:
        """Return the sums of masks over their draws and over the images of each group, `[masks, groups]`."""
        sums = self.sums[quantity]
        return np.stack([sums[self.places[key]].sum(axis=0) for key in keys])

    def draws_of(self, keys: Sequence[Key]) -> IntArray:
        """Return how many draws each mask has, `[masks]`."""
        return np.array([len(self.places[key]) for key in keys], dtype=np.int64)


@dataclass(frozen=True)
class Pair:
    """Two runs that can be compared.

    Attributes:
        first: The one that the other is held against.
        second: The other.
        keys: Masks, with their ablations, that both have, in the order of the first.
        quantities: What both have of them.
        other_rows: Why the images count as drawn apart; nothing where both judged the very same.
        said: What else differs, a sentence each.
    """

    first: Measured
    second: Measured
    keys: list[Key]
    quantities: list[str]
    other_rows: str
    said: list[str]

    @property
    def test(self) -> str:
        """The name of the test, in every row of the tables."""
        return TWO_SAMPLE if self.other_rows else PAIRED

    @property
    def names(self) -> Row:
        """The cells that name the two runs."""
        return {"run_a": self.first.name, "run_b": self.second.name}


def measured(run: RunFiles, name: str) -> Measured:
    """Return what a finished run measured.

    Raises:
        UsageError: It is not finished, failed, measured no mask, or has no `groups.npz` of its own.
    """
    status = run.record.get("status", "done")
    if status != "done":
        raise UsageError(
            f"only finished runs can be compared, and this one is {status!r} in its run.json: the same command "
            f"continues it ({run.record.get('command', 'not known')}), got {str(run.path)!r}"
        )
    if len(run.masks) < 2:
        raise UsageError(f"a comparison needs masks, and this run scored the whole model alone, got {str(run.path)!r}")
    groups = run.arrays("groups.npz")
    columns = ("mask", "ablation", "draw")
    rows = [tuple(str(row[column]) for column in columns) for row in run.masks]
    if not groups or rows != [tuple(map(str, row)) for row in zip(*(groups[one] for one in columns), strict=True)]:
        why = "of another run than masks.csv" if groups else "missing: an older release wrote the run"
        raise UsageError(f"groups.npz is {why}; run the command in its run.json again, got {str(run.path)!r}")
    places: dict[Key, list[int]] = {}
    for number, row in enumerate(run.masks[1:], start=1):
        places.setdefault((str(row["mask"]), str(row["ablation"])), []).append(number)
    counts = {name: np.asarray(groups[name], dtype=np.int64) for name in ("images", "feature_images") if name in groups}
    features = counts["feature_images"][0] if "feature_images" in counts else None  # of the baseline's row
    images = counts.get("images", features)
    if images is None:
        raise UsageError(f"groups.npz counts no images: it was changed; run the command again, got {str(run.path)!r}")
    sums = _sums(run, groups)
    counted = {name: images if features is None or name not in FEATURES else features for name in sums}
    return Measured(run, name, images, counted, sums, places)


def _sums(run: RunFiles, groups: dict[str, Any]) -> dict[str, FloatArray]:
    """Return the sums by group of all quantities that the run has, scaled to the means of `masks.csv`."""
    sums = {name: np.asarray(groups[name], dtype=np.float64) for name in FEATURES if name in groups}
    if sums and "feature_images" in groups:
        # A mask with a NaN or infinite feature is a mean over fewer images than others: it cannot be tested with them.
        fewer = (groups["feature_images"] != groups["feature_images"][0]).any(axis=1, keepdims=True)
        sums = {name: np.where(fewer, np.nan, values) for name, values in sums.items()}
    if "nll" not in groups:
        return sums
    sums |= rises_and_drops(groups)
    # Images that count as wrong without being read are in no group, and yet the drop is a share of them too.
    read, images = int(groups["images"].sum()), int(run.masks[0]["images"])
    if images > read:
        sums[DROP_PP] = sums[DROP_PP] * (read / images)
    return sums


def pair_of(first: Measured, second: Measured) -> Pair:
    """Return what of two runs can be compared.

    Raises:
        UsageError: Nothing can be; the message says what differs.
    """
    _check_heads(first, second)
    keys, said = _in_common(first, second)
    quantities = [name for name in first.quantities if name in second.quantities]
    if not quantities:
        one, other = (", ".join(own.quantities) or "nothing" for own in (first, second))
        raise _refused(first, second, f"other quantities: the one measured {one}, the other {other}")
    fitted = bool({ablation for _, ablation in keys} & FITTED)
    records = first.run.record, second.run.record
    other_rows = not_the_same_rows(first.run, second.run, first.images, second.images)
    said += differences(*records, fitted)
    if (
        not other_rows
        and _weights(first) == _weights(second) is not None
        and records[0].get("key") != records[1].get("key")
    ):
        said.append("the same weights judged the same images: what differs is no property of a model or of data")
    return Pair(first, second, keys, quantities, other_rows, said)


def _weights(own: Measured) -> str | None:
    digest = own.run.record["model"].get("weights_sha256")
    return str(digest) if digest else None


def _check_heads(first: Measured, second: Measured) -> None:
    """Refuse models whose heads are not the same, or whose masks take something else away."""
    models = [own.run.record["model"] for own in (first, second)]
    layouts = [[int(heads) for heads in model["heads_per_layer"]] for model in models]
    if layouts[0] != layouts[1]:
        one, other = (f"{counted(sum(own), 'head')} in {counted(len(own), 'layer')}" for own in layouts)
        if one == other:
            one, other = (f"heads per layer {own}" for own in layouts)
        raise _refused(first, second, f"other head layouts: {one} and {other}")
    semantics = [str(model.get("semantics", "slot")) for model in models]
    if semantics[0] != semantics[1]:
        raise _refused(
            first,
            second,
            f"other semantics: a mask takes away the {semantics[0]} in the one, the {semantics[1]} in the other",
        )


def _in_common(first: Measured, second: Measured) -> tuple[list[Key], list[str]]:
    """Return the masks that both have, and sentences about those that are left out.

    Raises:
        UsageError: There is none.
    """
    other_heads = {
        mask for mask, heads in first.run.heads.items() if set(heads) != set(second.run.heads.get(mask, heads))
    }
    both = [key for key in first.places if key in second.places]
    keys = [key for key in both if key[0] not in other_heads]
    if not keys:
        raise _refused(first, second, "".join(_why_none(first, second, other_heads)))
    said = [
        f"{counted(len(own.places) - len(both), 'mask')} of {own.name} alone left out (a mask counts once under each "
        "ablation)"
        for own in (first, second)
        if len(own.places) > len(both)
    ]
    if left := len(both) - len(keys):
        said.append(f"{counted(left, 'mask')} left out that hit other heads in each run under the same name")
    return keys, said


def _why_none(first: Measured, second: Measured, other_heads: set[str]) -> Iterator[str]:
    masks = [dict.fromkeys(mask for mask, _ in own.places) for own in (first, second)]
    if other_heads & masks[0].keys() & masks[1].keys():
        yield "other masks: those of the same name hit other heads"
    elif masks[0].keys() & masks[1].keys():
        one, other = (", ".join(dict.fromkeys(kind for _, kind in own.places)) for own in (first, second))
        yield f"other ablations: {one} and {other}"
    else:
        one, other = (", ".join(list(own)[:2]) + ", ..." * (len(own) > 2) for own in masks)
        yield f"other masks: {one} and {other}"


def _refused(first: Measured, second: Measured, why: str) -> UsageError:
    return UsageError(
        f"these runs cannot be compared, they have {why}; compare runs of the same --mask-spec and --ablation, and of "
        f"models with the same heads, got {str(first.run.path)!r} and {str(second.run.path)!r}"
    )
