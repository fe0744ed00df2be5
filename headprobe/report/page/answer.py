"""The answer to "What does the multi-head do?", in sentences that are filled with the measured numbers of a run."""

from collections.abc import Callable

from headprobe.report.page.answers import descriptions, features, masks, orders, sets
from headprobe.report.page.answers.wording import Sentence
from headprobe.report.page.notices import notices
from headprobe.report.page.provenance import provenance
from headprobe.run.load import RunFiles

__all__ = ["Sentence", "answer", "notices", "provenance"]

SENTENCES: tuple[Callable[[RunFiles], Sentence | None], ...] = (
    masks.baseline,
    masks.other_masks,
    masks.layers,
    masks.costly_heads,
    masks.heads_that_differ,
    masks.useless_heads,
    sets.random_heads,
    orders.removable,
    sets.linear_replacement,
    sets.ablations_agree,
    sets.indices,
    sets.interactions,
    sets.shapley,
    descriptions.scores,
    descriptions.distance,
    descriptions.entropy,
    descriptions.frequencies,
    descriptions.similarity,
)
"""In the order of the page. Each gives nothing where its table is missing."""

WITHOUT_LABELS: tuple[Callable[[RunFiles], Sentence | None], ...] = (
    features.moved,
    features.layers,
    features.heads,
    descriptions.distance,
    descriptions.entropy,
    descriptions.frequencies,
    descriptions.similarity,
)
"""Those of a run that was judged by its features alone."""


def answer(run: RunFiles) -> list[Sentence]:
    """Return the sentences that a run's files allow, each with the unrounded numbers in it.

    They state what sets of heads cost, with 95% intervals as `docs/results.md` defines them, never what a head is for.
    Where nothing is significant they say so, and what so many images could have found.
    """
    sentences = SENTENCES if run.labelled else WITHOUT_LABELS
    return [sentence for say in sentences if (sentence := say(run)) is not None]
