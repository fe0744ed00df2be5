"""`HeadSimilarity`: which heads resemble each other."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from headprobe.callbacks.head_callback import Columns, HeadCallback, by_layer_mean
from headprobe.describe.base import BASELINE, CHANGE, MASKED, prefixed
from headprobe.describe.similarity import SimilaritySums
from headprobe.metrics.similarity.measures import MEASURES, VARIANCE, Measure, title
from headprobe.report.similarity_figures import similarity_by_layer, similarity_clustered
from headprobe.units.tree import Arrays

DRAWN: tuple[Measure, ...] = ("svcca", "cka_unbiased")
"""Measures that get figures, if they are computed; all are in `similarity.npz`."""


class HeadSimilarity(HeadCallback):
    """Writes `similarity.npz`: how similar heads are, with floors and intervals; see docs/describe_heads.md.

    Args:
        scope: Heads that are compared: `within` each layer, `all` of the model, or those of `pairs` of layers.
        sampling: What a sample is: any of the `tokens`, `patches` (tokens with a place on the image), the `class`
            token, or the `mean` over an image's tokens.
        pairs: Pairs of layers, for the scope `pairs`.
        variance: Share of the sum of squares that SVCCA keeps.
        measures: Which to compute; all of them if not given.
        groups: Groups of images for the intervals, 2 to 16, or 0 for none; 16 within layers if not given.
        noise_floor: Also compare heads on different images: what unrelated images score.
        precision: Number format of the products behind the float64 sums, where samples are tokens or patches.
    """

    statistic: SimilaritySums

    def __init__(
        self,
        scope: str = "within",
        sampling: str = "tokens",
        pairs: list[tuple[int, int]] | None = None,
        variance: float = VARIANCE,
        measures: list[str] | None = None,
        groups: int | None = None,
        noise_floor: bool = True,
        precision: str = "float64",
    ) -> None:
        # plain texts, checked by the statistic: jsonargparse would bury the choices under those of all callbacks
        chosen = tuple(MEASURES if measures is None else measures)
        what: Any = (scope, sampling, pairs or (), variance, chosen, groups, noise_floor, precision)
        super().__init__(SimilaritySums(*what))

    def columns(self) -> dict[str, Columns]:
        """Return ranks, kept dims, and each head's mean similarity with the heads that it was compared with."""
        arrays = self.statistic.matrices()
        columns: dict[str, Columns] = {}
        means: Columns
        for model in (BASELINE, MASKED, CHANGE):
            matrices = {measure: arrays.get(prefixed(model, measure)) for measure in self.statistic.measures}
            means = {f"{name}_mean": others_mean(matrix) for name, matrix in matrices.items() if matrix is not None}
            if model in self.statistic.subject.models:
                ranks = {"rank": arrays[prefixed(model, "rank")], "kept_dims": arrays[prefixed(model, "kept")]}
                means = {**{name: known(numbers) for name, numbers in ranks.items()}, **means}
            if means:
                columns[model] = means
        return columns

    def arrays(self) -> dict[str, Arrays]:
        """Return `similarity.npz`."""
        return {"similarity.npz": self.statistic.matrices()}

    def figures(self, about: str) -> dict[str, Figure]:
        """Return matrices ordered by layer and clustered, for each model, and of the differences."""
        found: dict[str, Figure] = {}
        for measure in [name for name in DRAWN if name in self.statistic.measures] or self.statistic.measures[:1]:
            for model in self.statistic.subject.models:
                found |= self._of_model(measure, model, about)
            if self.statistic.subject.mask is not None:
                values, heading = self._matrix(prefixed(CHANGE, measure)), self._title(measure, CHANGE, about)
                found[f"{measure}/change"] = similarity_by_layer(
                    values, self._axis("layer"), self._axis("head"), heading, "change", diverging=True
                )
        return found

    def _of_model(self, measure: Measure, model: str, about: str) -> dict[str, Figure]:
        """Return a model's two figures of one measure."""
        values, floor = self._matrix(prefixed(model, measure)), prefixed(model, f"{measure}_floor")
        floors = self._matrix(floor) if floor in self.statistic.matrices() else None
        label, heading = title(measure, self.statistic.moment_options.sampling), self._title(measure, model, about)
        axes = (self._axis("layer"), self._axis("head"))
        return {
            f"{measure}/by_layer_{model}": similarity_by_layer(values, *axes, heading, label, floor=floors),
            f"{measure}/clustered_{model}": similarity_clustered(values, *axes, heading, label, floor=floors),
        }

    def _title(self, measure: Measure, model: str, about: str) -> str:
        name, whose = title(measure, self.statistic.moment_options.sampling), self.statistic.subject.title(model)
        return f"{name} of heads: {whose}\n{about}, {self.note()}"

    def _matrix(self, name: str) -> NDArray[np.float64]:
        return np.asarray(self.statistic.matrices()[name], dtype=np.float64)

    def _axis(self, name: str) -> NDArray[np.int64]:
        return np.asarray(self.statistic.matrices()[name], dtype=np.int64)

    def undefined(self) -> dict[str, dict[str, list[int]]]:
        """Return the layers whose heads were compared with no other."""
        options, heads = self.statistic.moment_options, self.statistic.subject.layout.heads_per_layer
        compared = {layer for one in self.statistic.comparisons()[BASELINE] for layer in one.moments.layer.tolist()}
        outside = [layer for layer in range(len(heads)) if layer not in compared]
        alone = [layer for layer in sorted(compared) if heads[layer] == 1 and options.scope == "within"]
        reasons = {"the layer is in none of the pairs": outside, "the layer has a single head": alone}
        given = {reason: layers for reason, layers in reasons.items() if layers}
        return {f"{measure}_mean": dict(given) for measure in self.statistic.measures} if given else {}

    def summary(self) -> dict[str, ArrayLike]:
        """Return each layer's mean similarity of different heads, and that of unrelated images."""
        arrays, measure = self.statistic.matrices(), self.statistic.measures[0]
        name = title(measure, self.statistic.moment_options.sampling)
        found: dict[str, ArrayLike] = {name: by_layer_mean(self._axis("layer"), others_mean(arrays[measure]))}
        if f"{measure}_floor" in arrays:
            found["its floor"] = by_layer_mean(self._axis("layer"), others_mean(arrays[f"{measure}_floor"]))
        return found

    def note(self) -> str:
        """Return what a sample is, and how many there are."""
        arrays, options = self.statistic.matrices(), self.statistic.moment_options
        what = {"tokens": "all tokens", "patches": "patch tokens", "class": "class tokens", "mean": "token means"}
        counts = np.asarray(arrays["samples"], dtype=np.int64)
        least, most = int(counts[counts > 0].min(initial=counts.max())), int(counts.max())
        number = f"{most:,}" if least == most else f"{least:,} to {most:,}"
        return f"{number} samples ({what[options.sampling]} of {int(arrays['images']):,} images)"


def others_mean(matrix: NDArray[np.generic]) -> NDArray[np.float64]:
    """Return each head's mean over all other heads that it was compared with, NaN where there is none."""
    others = matrix.astype(np.float64)
    np.fill_diagonal(others, np.nan)
    finite = np.isfinite(others)
    total = np.where(finite, others, 0).sum(axis=1)
    count = finite.sum(axis=1)
    return np.asarray(np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0), dtype=np.float64)


def known(numbers: NDArray[np.generic]) -> NDArray[np.generic]:
    """Return whole numbers as they are, or with NaN for those of heads that were not looked at (-1)."""
    return np.where(numbers < 0, np.nan, numbers) if (numbers < 0).any() else numbers  # type: ignore[operator]
