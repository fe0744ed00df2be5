"""Shapley values and interactions of players, from the values of sets of them. Values are sums by image group.

A game gives a value to each set of players: here what the model loses without these heads or layers, the NLL rise or
the drop. Everything below is linear in the values, so sums over the images of a group go in and come out.
"""

from collections.abc import Sequence
from math import comb
from typing import NamedTuple

import numpy as np
from scipy import stats

from headprobe.metrics.accuracy.jackknife import mean_with_error
from headprobe.metrics.arrays import FloatArray, IntArray

FEWEST_SAMPLES = 5
"""With fewer orders the spread of the samples says too little about the error of their mean."""


class Estimates(NamedTuple):
    """A number for each player, with its 95% interval and the two errors that make it; NaN where not defined."""

    value: FloatArray
    low: FloatArray
    high: FloatArray
    se_orders: FloatArray  #: standard error over the sampled orders; 0 where nothing was sampled
    se_images: FloatArray  #: standard error over the images (delete-a-group jackknife)


def along_order(values: FloatArray, order: Sequence[int]) -> FloatArray:
    """Return what each player adds when the players come one after the other: one sample of the Shapley values.

    Args:
        values: Of the first 0, 1, ... all players of the order, `[players + 1, groups]`.
        order: Numbers of the players, in the order in which they come.

    Returns:
        `[players, groups]`, by the players' numbers.

    Source: Castro, Gomez and Tejada, 2009, Computers & Operations Research 36, 1726-1730.
    """
    added = np.empty_like(values[1:])
    added[list(order)] = np.diff(values, axis=0)
    return added


def mean_of_samples(samples: FloatArray, images: IntArray) -> Estimates:
    """Return the means of samples with intervals for what all orders give on all images that these stand for.

    The orders are sampled and so are the images: the variance is the sum of that over orders and that over image
    groups. What is noise of both at once is in both terms, which makes the interval wider, never narrower. Degrees of
    freedom are Satterthwaite's for such a sum, at least those of the orders alone or of the groups alone.

    Args:
        samples: `[samples, players, groups]`; an order and its reverse are one sample, their mean.
        images: Images of each group, `[groups]`.

    Source: Satterthwaite, 1946, Biometrics Bulletin 2, 110-114.
    """
    count = len(samples)
    value, se_images = mean_with_error(samples.mean(axis=0), images)
    of_samples, _ = mean_with_error(samples, images)  # [samples, players]
    se_orders = np.asarray(of_samples.std(axis=0, ddof=1) / np.sqrt(count))
    groups = int((images > 0).sum())
    parts = np.stack([se_orders**2, se_images**2])  # [2, players]
    total = parts.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        freedom = total**2 / (parts[0] ** 2 / (count - 1) + parts[1] ** 2 / max(groups - 1, 1))
    return Estimates(value, *limits(value, np.sqrt(total), freedom), se_orders, se_images)


def exactly(values: FloatArray, images: IntArray) -> Estimates:
    """Return numbers that follow from the values of all sets: only the images are sampled.

    Args:
        values: `[..., groups]`, sums of what `exact_values` or `exact_interactions` gives.
        images: Images of each group, `[groups]`.
    """
    value, se_images = mean_with_error(values, images)
    low, high = limits(value, se_images, np.full_like(value, (images > 0).sum() - 1))
    return Estimates(value, low, high, np.zeros_like(value), se_images)


def limits(value: FloatArray, error: FloatArray, freedom: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return Student's 95% limits; NaN where there is no error to go by, or nothing varied at all."""
    error = np.where(error > 0, error, np.nan)
    reach = stats.t.isf(0.025, freedom) * error
    return np.asarray(value - reach), np.asarray(value + reach)


def exact_values(values: FloatArray) -> FloatArray:
    """Return the Shapley value of each player: what it adds to a set, the mean over all orders of the players.

    Args:
        values: Of all sets, `[2 ** players, groups]`; player p is in set s if bit p of s is 1.

    Returns:
        `[players, groups]`.

    Source: Shapley, 1953, Contributions to the Theory of Games II, 307-317.
    """
    players, sets, sizes = _sets(values)
    found = np.empty((players, values.shape[1]))
    for player in range(players):
        without = sets[sets & (1 << player) == 0]
        weights = np.array([1 / (players * comb(players - 1, size)) for size in range(players)])[sizes[without]]
        found[player] = weights @ (values[without | (1 << player)] - values[without])
    return found


def exact_interactions(values: FloatArray) -> FloatArray:
    """Return the Shapley interaction index of each two players.

    It is what two players add to a set together beyond what each adds alone, the mean over sets as the Shapley value
    takes it, the two being one player. With two players it is the plain interaction, joint minus the sum of singles.

    Args:
        values: Of all sets, as for `exact_values`.

    Returns:
        `[pairs, groups]`, pairs in ascending order: (0, 1), (0, 2), ... (1, 2), ...

    Source: Grabisch and Roubens, 1999, International Journal of Game Theory 28, 547-565, section 3.
    """
    players, sets, sizes = _sets(values)
    found = []
    weight = np.array([1 / ((players - 1) * comb(players - 2, size)) for size in range(players - 1)])
    for first in range(players):
        for second in range(first + 1, players):
            one, other = 1 << first, 1 << second
            without = sets[sets & (one | other) == 0]
            both = values[without | one | other] - values[without | one] - values[without | other] + values[without]
            found.append(weight[sizes[without]] @ both)
    return np.array(found).reshape(-1, values.shape[1])


def _sets(values: FloatArray) -> tuple[int, IntArray, IntArray]:
    """Return the number of players, and of all their sets the numbers and sizes."""
    sets = np.arange(len(values))
    return len(values).bit_length() - 1, sets, np.bitwise_count(sets).astype(np.int64)
