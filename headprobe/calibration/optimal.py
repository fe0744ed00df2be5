"""The search for the constant of each head with which the model loses least: rounds over the calibration rows.

A round is one forward and backward pass over all of them. Each head has a variant of its own, in which it alone is
ablated with its trial constant: so one round gives the loss of every head's trial and its gradient. The first process
moves all heads on, from their means, until no head can gain or `MOST_ROUNDS` are over; heads that have converged take
part no longer. A head keeps the best constant that it tried, so none is worse than its mean on the calibration rows.

Source: Li & Janson, 2024, Optimal ablation for interpretability, https://arxiv.org/abs/2409.09951. They optimise with
stochastic gradients and one loss for a whole circuit; here every head is optimised alone, on all rows at once.
"""

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from headprobe.calibration.constants import Calibration
from headprobe.calibration.descent import Descent
from headprobe.errors import UsageError
from headprobe.masks.ablations import OPTIMAL
from headprobe.masks.spec import Variant
from headprobe.metrics.arrays import FloatArray
from headprobe.metrics.sums import SumMetric
from headprobe.text import counted

MOST_ROUNDS = 40

Head = tuple[int, int]
"""Its layer, and its number in the layer."""


class TrialSums(SumMetric):
    """Sums over images of the loss of each head's trial constant, and of the loss's gradient.

    Args:
        heads: How many heads try a constant.
        dim: Channels of the widest head; the gradients of others end in zeros.
    """

    MERGEABLE = "sums of equal (heads, channels)"

    images: Tensor  #: int64 `[]`
    loss: Tensor  #: float64 `[heads]`, nats
    gradient: Tensor  #: float64 `[heads, dim]`

    def __init__(self, heads: int, dim: int) -> None:
        self.heads, self.dim = heads, dim
        super().__init__(
            {
                "images": ((), torch.int64),
                "loss": ((heads,), torch.float64),
                "gradient": ((heads, dim), torch.float64),
            },
            synced=False,
        )

    @property
    def signature(self) -> tuple[Any, ...]:
        """Numbers of heads and channels."""
        return (self.heads, self.dim)

    def empty(self) -> Self:
        """Return the metric of as many heads without images."""
        return type(self)(self.heads, self.dim)

    def update(self, loss: Tensor, gradient: Tensor, images: int) -> None:
        """Add the sums of some images: `loss` `[heads]` and `gradient` `[heads, dim]`."""
        self.add({"images": torch.tensor(images), "loss": loss, "gradient": gradient})

    def compute(self) -> tuple[FloatArray, FloatArray]:
        """Return the mean loss `[heads]` and its gradient `[heads, dim]`; NaN without images."""
        images = int(self.images) or np.nan
        return self.loss.cpu().numpy() / images, self.gradient.cpu().numpy() / images


@dataclass(frozen=True)
class Round:
    """What one pass over the calibration rows evaluates.

    Attributes:
        heads: The heads that try a constant.
        trial: Their constants `[heads, dim]`; those of narrower heads end in zeros.
    """

    heads: tuple[Head, ...]
    trial: FloatArray

    def identity(self) -> dict[str, Any]:
        """Return what changes the sums of this round: its heads and their constants, to the bit."""
        digest = hashlib.sha256(np.ascontiguousarray(self.trial, dtype="<f8").tobytes()).hexdigest()
        return {"heads": [list(head) for head in self.heads], "constants_sha256": digest}

    def keep(self, heads_per_layer: Sequence[int]) -> Tensor:
        """Return `[heads, layers, max heads]` bool, True = keep: each variant masks one head."""
        keep = torch.ones(len(self.heads), len(heads_per_layer), max(heads_per_layer), dtype=torch.bool)
        for variant, (layer, head) in enumerate(self.heads):
            keep[variant, layer, head] = False
        return keep

    def constants(self, heads_per_layer: Sequence[int], head_dims: Sequence[int]) -> list[Tensor]:
        """Return float32 constants by layer `[heads, head_dim]`, 0 for heads that take no part."""
        found = [torch.zeros(heads, dim) for heads, dim in zip(heads_per_layer, head_dims, strict=True)]
        for (layer, head), trial in zip(self.heads, self.trial, strict=True):
            found[layer][head] = torch.from_numpy(trial[: head_dims[layer]].copy())
        return found

    def to_bytes(self) -> bytes:
        """Return the content of an npz file, for other processes."""
        out = io.BytesIO()
        np.savez(out, heads=np.asarray(self.heads, dtype=np.int64).reshape(-1, 2), trial=self.trial)
        return out.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> "Round":
        """Return the round that `to_bytes` was called on."""
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            heads = tuple((int(layer), int(head)) for layer, head in arrays["heads"])
            return cls(heads, arrays["trial"])


class Search:
    """The search for the optimal constants of some heads.

    Args:
        heads: The heads.
        calibration: Has their means, from which the search begins.

    Attributes:
        now: The round to evaluate next; one without heads is the end.
        done: Rounds that were evaluated.
    """

    def __init__(self, heads: Sequence[Head], calibration: Calibration) -> None:
        self.calibration, self.most_rounds, self.done = calibration, MOST_ROUNDS, 0
        self._descents: dict[Head, Descent] = {}
        self._rounds: dict[Head, int] = {}
        for layer, head in heads:
            self._descents[layer, head] = Descent(calibration.layers[layer].mean[head].astype(np.float64))
            self._rounds[layer, head] = 0
        self.dim = max(layer.mean.shape[1] for layer in calibration.layers)
        self.now = self._next(0)

    def take(self, sums: TrialSums) -> Round:
        """Move every head on by what the round `now` has found, and return the next; on one process only."""
        losses, gradients = sums.compute()
        for head, loss, gradient in zip(self.now.heads, losses, gradients, strict=True):
            descent = self._descents[head]
            descent.take(float(loss), gradient[: len(descent.best)])
            self._rounds[head] += 1
        return self._next(self.done + 1)

    def _next(self, done: int) -> Round:
        """Return the round after `done` others, of the heads that have not converged."""
        left = [head for head, descent in self._descents.items() if not descent.converged]
        heads = tuple(left) if done < self.most_rounds else ()
        trial = np.zeros((len(heads), self.dim))
        for row, head in enumerate(heads):
            constant = self._descents[head].trial
            trial[row, : len(constant)] = constant
        return Round(heads, trial)

    def found(self) -> Calibration:
        """Return the calibration with the optimal constants, and with how each head's search ended."""
        layers = [
            replace(layer, optimal=np.full_like(layer.mean, np.nan, dtype=np.float64))
            for layer in self.calibration.layers
        ]
        for (layer, head), descent in self._descents.items():
            constants = layers[layer].optimal
            if constants is not None:
                constants[head] = descent.best
        about = {"most_rounds": self.most_rounds, "rounds": self.done, "heads": self._by_head()}
        return Calibration(layers, {**self.calibration.about, OPTIMAL: about})

    def _by_head(self) -> list[dict[str, Any]]:
        """Return for every head its losses on the calibration rows in nats, its rounds and whether it converged."""
        return [
            {
                "layer": layer,
                "head": head,
                "nll_of_mean": _finite(descent.start_loss),
                "nll": _finite(descent.best_loss),
                "rounds": self._rounds[layer, head],
                "converged": descent.converged and np.isfinite(descent.best_loss).item(),
            }
            for (layer, head), descent in self._descents.items()
        ]


def _finite(loss: float) -> float | None:
    """Return a loss for JSON, which has no NaN."""
    return float(loss) if np.isfinite(loss) else None


def heads_to_optimise(variants: Sequence[Variant]) -> list[Head]:
    """Return the heads that any variant replaces by their optimal constants, in the model's order."""
    return sorted(set().union(*(one.mask.mask.masked for one in variants if one.ablation == OPTIMAL)))


def refuse_missing(calibration: Calibration, variants: Sequence[Variant]) -> None:
    """Refuse a calibration that lacks the optimal constant of a head that a variant needs.

    Raises:
        UsageError: With the heads.
    """
    heads = heads_to_optimise(variants)
    missing = [head for head in heads if not _optimised(calibration, *head)]
    if missing:
        names = ", ".join(f"{layer}.{head}" for layer, head in missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise UsageError(
            "the ablation optimal is fitted for the heads of a run's own masks, and this calibration has none for "
            f"{counted(len(missing), 'head')} of {len(heads)}: fit it anew without --calibration-file, got no constant "
            f"for {names}"
        )


def _optimised(calibration: Calibration, layer: int, head: int) -> bool:
    constants = calibration.layers[layer].optimal
    return constants is not None and bool(np.isfinite(constants[head]).all())


def in_words(about: Mapping[str, Any]) -> str:
    """Return how a search ended, from what a calibration says of it: `22 of 24 heads converged within 31 rounds`."""
    heads = about["heads"]
    converged = sum(one["converged"] for one in heads)
    return f"{converged} of {counted(len(heads), 'head')} converged within {counted(about['rounds'], 'round')}"


def warning_of(calibration: Calibration) -> str:
    """Return the warning of heads whose search has not converged; empty where there is none."""
    about = calibration.about.get(OPTIMAL, {"heads": []})
    left = [f"{one['layer']}.{one['head']}" for one in about["heads"] if not one["converged"]]
    if not left:
        return ""
    shown = ", ".join(left[:10]) + (", ..." if len(left) > 10 else "")
    return (
        f"the ablation optimal has not converged within {about['most_rounds']} rounds for "
        f"{counted(len(left), 'head')} ({shown}): the best constant so far is used, which is no worse than the mean on "
        "the calibration images"
    )
