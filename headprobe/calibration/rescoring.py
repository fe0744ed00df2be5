"""Orders of heads whose scores are computed anew after each tenth of the heads: rounds over the calibration rows.

A round is one pass over all of them of the model without the heads that the order has masked so far. What takes their
place is an ablation of the run, whose constants stay those of the whole model. The heads that are left are scored as
if the constants were folded into the weights: xi multiplies what a head computes before slots are filled from it, and
under `linear` a head's output projection is `W_h + W_S B_h`, what it writes itself and through the heads that it stands
for. So the scores are those of a model that is really smaller.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from headprobe.backbone.heads.layout import HeadLayout
from headprobe.backbone.masking.ablation import ablating, masks_of_rows
from headprobe.calibration.constants import RESCORED_ORDERS, Calibration, digest_of, predict_masked, without_heads
from headprobe.calibration.fills import replacements_of
from headprobe.calibration.scores import OF_VARIANCE, ScoreStatistic, variance_scores
from headprobe.calibration.slots import SlotStatistic
from headprobe.describe.base import HeadStatistic
from headprobe.errors import RunError
from headprobe.masks.ablations import LINEAR, MEAN, POSITION, ZERO, Ablations
from headprobe.masks.draws import Head
from headprobe.masks.head_mask import HeadMask
from headprobe.masks.orders import MOST, GrowColumn
from headprobe.masks.spec import NamedMask, Variant
from headprobe.masks.tables import order_of
from headprobe.metrics.arrays import FloatArray
from headprobe.metrics.projection import HeadProjection

STEPS = 10
"""Scores are computed anew whenever one more of so many equal shares of the heads is masked."""

CONSTANT_IN_ALL_ROUNDS = (ZERO, MEAN, POSITION, LINEAR)
"""Kinds of ablation that the whole model's calibration settles; optimal constants are sought for a known order only,
and resampling would draw anew in each round."""


def rescoring_kind(ablations: Ablations) -> str:
    """Return what fills the heads that are masked while others are scored: one for all ablations of a run.

    It is the first of the run's ablations that the calibration of the whole model settles, else the mean.
    """
    return next((one.kind for one in ablations if one.kind in CONSTANT_IN_ALL_ROUNDS), MEAN)


def step_ends(heads: int) -> list[int]:
    """Return how many heads are masked after each step: tenths of all heads, rounded, each step with a head or more."""
    return sorted({(2 * heads * step + STEPS) // (2 * STEPS) for step in range(1, STEPS + 1)} - {0})


def rounds_of(heads: int, wanted: int) -> int:
    """Return how many rounds an order takes whose first `wanted` heads are needed."""
    return sum(end < min(wanted, heads - 1) for end in step_ends(heads))


def distinct(clauses: Sequence[GrowColumn], heads: int) -> list[tuple[GrowColumn, int]]:
    """Return the orders to compute, each once, with how many of its first heads are needed, of so many in all."""
    found: dict[tuple[str, str], tuple[GrowColumn, int]] = {}
    for clause in clauses:
        key, wanted = (clause.column.text, clause.direction), clause.most(heads)
        found[key] = (clause, max(wanted, found[key][1] if key in found else 0))
    return list(found.values())


@dataclass(frozen=True)
class Round:
    """What one pass over the calibration rows scores.

    Attributes:
        masked: The heads that are masked, ascending.
        score: The score of the others that is wanted.
    """

    masked: tuple[Head, ...]
    score: str

    @property
    def needs_gradients(self) -> bool:
        """Whether the pass must go backward too."""
        return self.score not in OF_VARIANCE


class Rescoring:
    """The orders of a run that are scored anew step by step, one after the other.

    Args:
        orders: From `distinct`.
        layout: The model's attention layers.
        calibration: Constants and scores of the whole model.
        kind: What fills masked slots, from `rescoring_kind`.

    Attributes:
        now: The round to evaluate next; None at the end.
        done: Rounds that were evaluated.

    Raises:
        MaskSpecError: A head has no such score.
    """

    def __init__(
        self, orders: Sequence[tuple[GrowColumn, int]], layout: HeadLayout, calibration: Calibration, kind: str
    ) -> None:
        self.layout, self.calibration, self.kind, self.done = layout, calibration, kind, 0
        self._orders = [(clause, wanted, self._first(clause)) for clause, wanted in orders]
        self.now = self._next()

    def _first(self, clause: GrowColumn) -> list[Head]:
        """Return the heads of the first step: by the scores of the whole model."""
        order: list[Head] = []
        self._step(clause, order, self.calibration.scores[clause.column.text])
        return order

    def _step(self, clause: GrowColumn, order: list[Head], scores: Mapping[Head, float]) -> None:
        """Append the heads of one more step to an order, by the scores of those that are left."""
        left = {head: score for head, score in scores.items() if head not in order}
        most_first = clause.direction == MOST
        ranked = order_of(left, clause.column, self.layout.model, most_first=most_first, gone=len(order))
        size = next(end for end in step_ends(len(scores)) if end > len(order)) - len(order)
        # a single head that would be left needs no scores
        order += ranked if len(ranked) == size + 1 else ranked[:size]

    def _unfinished(self) -> tuple[GrowColumn, list[Head]] | None:
        return next(((clause, order) for clause, wanted, order in self._orders if len(order) < wanted), None)

    def _next(self) -> Round | None:
        unfinished = self._unfinished()
        return None if unfinished is None else Round(tuple(sorted(unfinished[1])), unfinished[0].column.text)

    def take(self, scores: FloatArray) -> None:
        """Move the order under way on by one step.

        Args:
            scores: What `scores` found in the round `now`, `[heads of the model]`.

        Raises:
            MaskSpecError: A head that is left has no such score.
            RunError: No round is under way.
        """
        unfinished = self._unfinished()
        if unfinished is None:
            raise RunError("no order is under way")
        heads = [(layer, head) for layer, count in enumerate(self.layout.heads_per_layer) for head in range(count)]
        self._step(*unfinished, dict(zip(heads, scores.tolist(), strict=True)))
        self.now, self.done = self._next(), self.done + 1

    def found(self) -> Calibration:
        """Return the calibration with the orders that were found."""
        orders = [
            {"score": clause.column.text, "direction": clause.direction, "heads": [list(head) for head in order]}
            for clause, _, order in self._orders
        ]
        about = {"ablation": self.kind, "rounds": self.done, "orders": orders}
        return Calibration(self.calibration.layers, {**self.calibration.about, RESCORED_ORDERS: about})

    # -- a round ---------------------------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """Return what changes the sums of the round `now`: its masked heads, and what fills them, to the bit."""
        masked = [] if self.now is None else [list(head) for head in self.now.masked]
        return {"masked": masked, "ablation": self.kind, "constants": "" if self.kind == ZERO else self._digest}

    @cached_property
    def _digest(self) -> str:
        return digest_of(self.calibration)

    @property
    def _keep(self) -> torch.Tensor:
        """Which heads the round keeps, `[layers, max heads]` bool."""
        return self._mask.keep()

    @property
    def _mask(self) -> HeadMask:
        return HeadMask(self.layout.heads_per_layer, frozenset(() if self.now is None else self.now.masked))

    def statistics(self, backbone: nn.Module, no_direct: str = "") -> tuple[HeadStatistic, ...]:
        """Return what the round sums: covariances or gradients, as the score needs them.

        Args:
            backbone: The model.
            no_direct: Why logits are no sums over heads.
        """
        if self.now is None or not self.now.needs_gradients:
            return (SlotStatistic([LINEAR]),)
        return SlotStatistic([MEAN]), ScoreStatistic(backbone, self.folded, no_direct=no_direct)

    def scores(self, statistics: Sequence[HeadStatistic]) -> FloatArray:
        """Return the round's score of every head once all sums are there, `[heads of the model]`; NaN where masked.

        Raises:
            RunError: The statistics are not those of the round.
        """
        slots, name = statistics[0], "" if self.now is None else self.now.score
        if not isinstance(slots, SlotStatistic):
            raise RunError("only the slots' own statistic calibrates")
        constants, keep = slots.constants(), self._keep.numpy()
        gradients = next((one for one in statistics if isinstance(one, ScoreStatistic)), None)
        by_gradient = None if gradients is None else gradients.scores(constants)
        projections = self.folded([fact.projection for fact in slots.subject.facts])
        found = []
        for number, layer in enumerate(constants):
            kept = keep[number, : len(layer.mean)]  # [heads]
            of_layer, projection = np.full(len(kept), np.nan), projections[number]
            if by_gradient is not None:
                of_layer[kept] = by_gradient[number][name][kept]
            elif projection is not None and kept.any():
                weight = projection.weight.double().cpu().numpy()[kept]
                of_layer[kept] = variance_scores(without_heads(layer, kept), weight)[name]
            found.append(of_layer)
        return np.concatenate(found)

    def folded(self, projections: Sequence[HeadProjection | None]) -> list[HeadProjection | None]:
        """Return the output projections of the smaller model: under linear kept heads write for masked ones too."""
        if self.kind != LINEAR:
            return list(projections)
        keep = self._keep.numpy()
        return [
            self._folded(number, projection, keep[number, : layer.heads].tolist())
            for number, (layer, projection) in enumerate(zip(self.layout.layers, projections, strict=True))
        ]

    def _folded(self, number: int, projection: HeadProjection | None, keep: Sequence[bool]) -> HeadProjection | None:
        if projection is None or all(keep) or not any(keep):
            return projection
        found = predict_masked(self.calibration.layers[number], keep)
        # [heads, dim, head_dim] -> [dim, heads * head_dim], the order of the constants' channels
        weight = projection.weight.double().transpose(0, 1).flatten(1)
        matrix = torch.from_numpy(found.matrix).to(weight)  # [masked, kept]
        weight[:, found.kept] += weight[:, found.masked] @ matrix
        return HeadProjection.split(weight, len(keep))

    @contextmanager
    def ablated(self, backbone: nn.Module) -> Iterator[None]:
        """Ablate the round's masked heads in the forward pass of `backbone` while the context is open.

        Open it before anything else hooks the model.

        Raises:
            RunError: The masks were not applied exactly once.
        """
        keep = masks_of_rows(self._keep[None].to(next(backbone.parameters()).device))
        with ablating(backbone, self.layout, keep, lambda: self._fills) as count:
            yield
            count.check(self.layout)

    def begin_round(self) -> None:
        """Make what fills the masked slots, outside of any inference mode: gradients pass through it."""
        with torch.inference_mode(False):
            variant = Variant(NamedMask("", self._mask, (), "", 0), self.kind)
            self._fills = replacements_of([variant], self.layout, self.calibration)


def stand_in_round(clause: GrowColumn, layout: HeadLayout, calibration: Calibration, kind: str) -> Rescoring:
    """Return a round of an order that was scored on nothing: with it a dry run costs what a run costs.

    Args:
        clause: The order.
        layout: The model's attention layers.
        calibration: Constants that were fitted on nothing.
        kind: What fills masked slots.
    """
    name = clause.column.text
    layers = [replace(layer, scores={name: np.zeros(len(layer.mean))}) for layer in calibration.layers]
    heads = sum(layout.heads_per_layer)
    return Rescoring([(clause, heads)], layout, Calibration(layers, calibration.about), kind)
