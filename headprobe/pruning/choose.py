"""Which set of heads to remove: the largest that is shown to lose little, or the smallest that is fast enough.

The sets are nested, in an order that the judged images had no part in.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from headprobe.errors import UsageError
from headprobe.masks.spec import Variant
from headprobe.metrics.accuracy.exact_limit import exact_drop_limit_pp
from headprobe.metrics.accuracy.paired_tests import drop_interval_pp, drop_pp
from headprobe.metrics.accuracy.scores import PairedScores
from headprobe.text import counted

MOST_IMAGES = 10**9

COUNTED_OUT = 100_000
"""Images up to which it is counted out how many would show a drop; score limits, which say nearly the same, go on."""


@dataclass(frozen=True)
class Tested:
    """One set of the sequence.

    Attributes:
        heads: How many heads it takes.
        images: Images that judged it.
        lost: Images that only the whole model has right.
        won: Images that only the masked model has right.
        limit_pp: Upper one-sided 95% limit of the drop of top-1, percentage points, exact.
        tested: Whether the sequence came to it.
    """

    heads: int
    images: int
    lost: int
    won: int
    limit_pp: float
    tested: bool

    @property
    def drop_pp(self) -> float:
        """The drop of top-1, percentage points."""
        return float(drop_pp(self.lost, self.won, self.images))


def fixed_sequence(counts: Sequence[tuple[int, int, int, int]], most_pp: float) -> tuple[list[Tested], int | None]:
    """Test sets from the smallest up until one is not shown to lose at most so much.

    Each is tested at 5% by its exact limit, in an order that is fixed beforehand, and nothing behind the first failure
    counts: so the chance to accept any set that loses more is that of one test, without a correction.

    Args:
        counts: Of each set its heads, images, lost and won, from the smallest up.
        most_pp: The largest drop allowed, percentage points.

    Returns:
        Every set, and the place of the last one that passed; None where the first one failed.

    Source: Maurer, Hothorn and Lehmacher, 1995, fixed-sequence tests; Westfall and Krishen, 2001, Journal of
    Statistical Planning and Inference 99, 25-40.
    """
    found: list[Tested] = []
    chosen: int | None = None
    open_still = True
    for place, (heads, images, lost, won) in enumerate(counts):
        limit = exact_drop_limit_pp(lost, won, images)
        found.append(Tested(heads, images, lost, won, limit, open_still))
        open_still = open_still and limit <= most_pp
        if open_still:
            chosen = place
    return found, chosen


def images_needed(most_pp: float, lost: int = 0, won: int = 0, images: int = 1) -> int | None:
    """Return the fewest images, no fewer than given, that can show a drop of at most so much.

    Args:
        most_pp: The largest drop allowed, percentage points.
        lost: Images that only the whole model has right, of `images`; as large a share is lost of more of them.
        won: Images that only the masked model has right.
        images: All images.

    Returns:
        None where no number of images would do: the drop itself is too large.
    """
    if 100 * (lost - won) / images >= most_pp:
        return None

    def shown(number: int) -> bool:
        share = number / images
        if number > COUNTED_OUT:
            return float(drop_interval_pp(lost * share, won * share, number, 0.90)[1]) <= most_pp
        return exact_drop_limit_pp(round(lost * share), round(won * share), number) <= most_pp

    low, high = images - 1, images
    while not shown(high):
        low, high = high, 2 * high
        if high > MOST_IMAGES:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if shown(middle) else (middle, high)
    return high


def refuse_few(images: int, most_pp: float) -> None:
    """Refuse images of which even a mask that flips none could not be shown to lose so little.

    Raises:
        UsageError: With the number that would do.
    """
    needed = images_needed(most_pp)
    if needed is not None and images < needed:
        raise UsageError(
            f"{images:,} judged images cannot show that a set loses at most {most_pp:g} points, even if no prediction "
            f"changes: give at least {needed:,} (--data.max_images, --data.calibration split:NAME), or allow more with "
            f"--keep-top1, got {most_pp:g}"
        )


def refuse_unordered(variants: Sequence[Variant]) -> None:
    """Refuse masks that are not nested, each with more heads than the one before.

    Raises:
        UsageError: Two of them are not.
    """
    for smaller, larger in pairwise(variants):
        if not smaller.mask.mask.masked < larger.mask.mask.masked:
            raise UsageError(
                "--keep-top1 and --speed choose among nested sets: give one grow:calibration:SCORE or grow:random:SEED "
                f"as --mask-spec, got {larger.mask.name} behind {smaller.mask.name}"
            )


def counts_of(variants: Sequence[Variant], scores: PairedScores) -> list[tuple[int, int, int, int]]:
    """Return heads, images, lost and won of every variant."""
    return [
        (
            variant.mask.mask.count,
            int(scores.images[row]),
            int(scores.right_to_wrong[row]),
            int(scores.wrong_to_right[row]),
        )
        for row, variant in enumerate(variants, start=1)
    ]


def why_none(first: Tested, most_pp: float) -> str:
    """Return why no set was chosen: the first one failed already."""
    needed = images_needed(most_pp, first.lost, first.won, first.images)
    more = (
        f"its drop is {first.drop_pp:+.2f} points, so no number of images would show it"
        if needed is None
        else f"if as many predictions change, about {needed:,} images would show it"
    )
    return (
        f"even the first set, of {counted(first.heads, 'head')}, may lose {first.limit_pp:.2f} points (95% limit on "
        f"{first.images:,} images), where --keep-top1 allows {most_pp:g}: {more}; nothing was written"
    )


def curve_text(tested: Sequence[Tested], chosen: int | None) -> str:
    """Return the sequence as the text of a CSV file."""
    lines = ["heads,images,right_to_wrong,wrong_to_right,drop_pp,limit_pp,tested,chosen"]
    for place, one in enumerate(tested):
        flips = f"{one.heads},{one.images},{one.lost},{one.won}"
        marks = f"{int(one.tested)},{int(place == chosen)}"
        lines.append(f"{flips},{one.drop_pp!r},{one.limit_pp!r},{marks}")
    return "\n".join(lines) + "\n"


# -- speed -------------------------------------------------------------------------------------------------------------


def smallest_fast(sets: int, wanted: float, speed_of: Callable[[int], float]) -> tuple[int | None, dict[int, float]]:
    """Find the smallest set that is fast enough by halving: the one before it was measured and was not.

    Args:
        sets: How many sets there are, each faster than the one before but for the noise of measuring.
        wanted: How many times faster it should be.
        speed_of: Measures a set by its place.

    Returns:
        Its place, None where not even the largest is fast enough; and all that was measured.
    """
    measured = {sets - 1: speed_of(sets - 1)}
    if measured[sets - 1] < wanted:
        return None, measured
    low, high = -1, sets - 1
    while high - low > 1:
        middle = (low + high) // 2
        measured[middle] = speed_of(middle)
        low, high = (low, middle) if measured[middle] >= wanted else (middle, high)
    return high, measured
