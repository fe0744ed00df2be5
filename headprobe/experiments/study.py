"""The study: everything that answers "What does the multi-head do?" for one model, as one `test`.

It is a choice of masks and ablations, made for the model at hand. What a model does not allow, or what would cost too
much for its number of heads, is left out, and the study says why.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import comb

import torch
from torch import Tensor

from headprobe.backbone.masking.replacement import refuse_kinds
from headprobe.calibration.scores import ScoreStatistic
from headprobe.errors import RunError, UsageError
from headprobe.masks.ablations import LINEAR, MEAN, ZERO, Ablations
from headprobe.masks.pieces import number_text
from headprobe.masks.tables import CALIBRATION
from headprobe.module import HeadProbe
from headprobe.text import Decision, counted, ranges

ORDERS = 10
"""Random orders, of which each is measured at so many sizes."""

SIZES = 10

NULL_DRAWS = 99
"""Draws of one head per layer beside each index: the fewest that give a p (`headprobe.run.index_null`)."""

BY_SCORE = ("residual_variance_after_projection", "variance_after_projection", "gradient_abs")
"""Scores by which heads are removed, least first."""

MOST_MORE = 150
"""Pairs, and masks that Shapley values need beyond the sizes: with more of them they are left out."""

FEWEST_WHOLE_ORDERS = 5
"""With fewer there are no Shapley values."""


@dataclass(frozen=True)
class Part:
    """Some masks of the study.

    Attributes:
        name: By which `--skip` leaves it out.
        says: What it is, in words.
        specs: Its mask specs.
        missing: Why there are none, or fewer than usual; nothing where all is there.
    """

    name: str
    says: str
    specs: tuple[str, ...] = ()
    missing: str = ""


@dataclass(frozen=True)
class Study:
    """What a study scores.

    Attributes:
        parts: Its parts, those without masks too.
        more: The user's own mask specs.
        ablations: The kinds of ablation.
        score_heads: Whether heads are scored on calibration images.
        missing: What it lacks beside masks, with the reasons.
    """

    parts: tuple[Part, ...]
    more: tuple[str, ...]
    ablations: Ablations
    score_heads: bool
    missing: dict[str, str]

    @property
    def specs(self) -> list[str]:
        """All mask specs, each once."""
        every = [spec for part in self.parts for spec in part.specs]
        return list(dict.fromkeys([*every, *self.more])) or ["none"]

    @property
    def left_out(self) -> str:
        """What is left out and why, in words; nothing where nothing is."""
        reasons = {part.name: part.missing for part in self.parts if part.missing} | self.missing
        return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())

    def choose(self, probe: HeadProbe) -> None:
        """Give the masks to a model, which says in its decisions what is left out."""
        probe.choose_masks(self.specs, self.ablations, self.score_heads)
        probe.remarks = [Decision("left out of the study", self.left_out, shown=True)] if self.left_out else []

    def lines(self) -> list[str]:
        """Return its parts in words."""
        parts = [f"{part.name} ({part.says})" for part in self.parts if part.specs]
        own = [f"--mask-spec ({', '.join(self.more)})"] if self.more else []
        if not parts and not own:
            return ["study: no masks, as all parts are skipped: the whole model alone"]
        return [f"study: {'; '.join([*parts, *own])}; ablation by {', '.join(one.text for one in self.ablations)}"]


def study_of(probe: HeadProbe, ablations: Ablations, skip: Sequence[str] = (), more: Sequence[str] = ()) -> Study:
    """Return the study of a model.

    Args:
        probe: The model. Its masks are changed.
        ablations: Kinds that are wanted; those that the model does not allow are left out.
        skip: Names of parts to leave out.
        more: Mask specs beside the study's.

    Raises:
        UsageError: There is no such part; the model allows none of the ablations, or its heads cannot be found.
    """
    strange = [name for name in skip if name not in PARTS]
    if strange:
        raise UsageError(f"--skip must be some of {', '.join(PARTS)}, joined with commas, got {strange[0]!r}")
    missing: dict[str, str] = {}
    allowed = _allowed(probe, ablations, missing)
    lacking = {} if "scores" in skip else _scores_lacking(probe)
    if SCORES in lacking:
        missing[SCORES] = lacking[SCORES]
    kinds = [ablation.kind for ablation in allowed]
    # 130 masks of a third kind would make a study a fifth longer, for curves that lie beside those of zero.
    ends = (ZERO, LINEAR) if set(kinds) == {ZERO, MEAN, LINEAR} else ()
    model = Heads(probe.layout.heads_per_layer, ZERO if ZERO in kinds else kinds[0], lacking, ends)
    parts = [make(model) for name, make in PARTS.items() if name not in skip]
    if len(kinds) == 1:
        parts = [replace(part, says=part.says.removesuffix(model.alone)) for part in parts]
    scored = "scores" not in skip and SCORES not in lacking
    return Study(tuple(parts), tuple(dict.fromkeys(more)), allowed, scored, missing)


SCORES = "scores of heads"


def _allowed(probe: HeadProbe, ablations: Ablations, missing: dict[str, str]) -> Ablations:
    """Return the ablations that the model's layers allow; note why the others are missing."""
    allowed, refused = [], None
    for ablation in ablations:
        try:
            refuse_kinds(probe.layout, {ablation.kind})
        except UsageError as error:
            # without what a user of --ablation would be told to do
            missing[ablation.kind], refused = re.split(r"[:;] choose ", str(error))[0], error
        else:
            allowed.append(ablation)
    if not allowed and refused is not None:
        raise refused
    return Ablations(allowed)


def _scores_lacking(probe: HeadProbe) -> dict[str, str]:
    """Return which scores some heads of the model do not have, with the reasons; `SCORES` where there are none.

    Tried on one image of noise: a forward pass may cut gradients off. Without labels there is no loss to try.
    """
    probe.choose_masks("none", score_heads=True)
    probe.begin_calibration(1)
    statistic = next(one for one in probe.statistics if isinstance(one, ScoreStatistic))
    if probe.passes is None:
        raise RunError("the forward passes are not planned")
    noise = torch.zeros(1, *probe.data_config["input_size"], dtype=torch.uint8, device=probe.device)
    labels = torch.zeros(1, dtype=torch.int64)
    try:
        if probe.labelled:
            probe.passes.score(noise, labels, lambda _: (), _any_loss, statistic.scoring, lambda *_: None)
    except UsageError as error:
        probe.end_calibration()
        return {SCORES: re.split(r": choose ", str(error))[0]} | dict.fromkeys(BY_SCORE, "heads cannot be scored")
    undefined = statistic.undefined()
    probe.end_calibration()
    return {
        name: "; ".join(f"{why}: layers {ranges(layers)}" for why, layers in reasons.items())
        for name, reasons in undefined.items()
    }


def _any_loss(logits: Tensor, _: Tensor) -> Tensor:
    return logits.double().logsumexp(dim=-1)


# -- parts -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heads:
    """What the parts are made for.

    Attributes:
        heads_per_layer: Heads of each layer.
        main: The kind of ablation under which alone masks are scored that only judge others, or that are very many.
        lacking: Scores that some heads do not have, with the reasons.
        ends: Kinds that orders of removal are scored under, where these are not all.
    """

    heads_per_layer: tuple[int, ...]
    main: str
    lacking: dict[str, str]
    ends: tuple[str, ...] = ()

    @property
    def heads(self) -> int:
        """All heads."""
        return sum(self.heads_per_layer)

    @property
    def sizes(self) -> list[int]:
        """Ten numbers of heads in equal steps, the last of them all; all numbers of a model with fewer heads."""
        return sorted({round(self.heads * step / SIZES) for step in range(1, SIZES + 1)} - {0})

    @property
    def of_ends(self) -> str:
        """How a spec begins whose masks are scored under `ends`."""
        return f"{','.join(self.ends)}:" if self.ends else ""

    @property
    def under_ends(self) -> str:
        """What is said of them."""
        return f", under {' and '.join(self.ends)}" if self.ends else ""

    @property
    def alone(self) -> str:
        """What is said of masks that are scored under the main kind alone."""
        return f", under {self.main} alone"


def _layers(model: Heads) -> Part:
    return Part("layers", counted(len(model.heads_per_layer), "mask"), ("each:layer",))


def _indices(model: Heads) -> Part:
    return Part("indices", counted(max(model.heads_per_layer), "mask"), ("each:index",))


def _nulls(model: Heads) -> Part:
    """Beside each index one head of each layer that has it, drawn at random."""
    counts = model.heads_per_layer
    sets = {tuple(layer for layer, own in enumerate(counts) if own > index) for index in range(max(counts))}
    specs = []
    for layers in sorted(sets, key=lambda own: (-len(own), own)):
        if all(counts[layer] == 1 for layer in layers):
            continue
        only = "" if len(layers) == len(counts) else f":{number_text(layers)}"
        specs.append(f"{model.main}:one-per-layer:0-{NULL_DRAWS - 1}{only}")
    if not specs:
        return Part("nulls", "", missing="each layer has a single head, so that there is nothing to draw")
    return Part("nulls", f"{len(specs) * NULL_DRAWS} draws of one head per layer{model.alone}", tuple(specs))


def _heads(model: Heads) -> Part:
    return Part("heads", counted(model.heads, "mask"), ("each:head",))


def _pairs(model: Heads) -> Part:
    pairs = sum(comb(own, 2) for own in model.heads_per_layer)
    if not pairs:
        return Part("pairs", "", missing="each layer has a single head")
    if pairs > MOST_MORE:
        missing = f"{pairs:,} pairs of heads within layers would cost too much (--mask-spec {model.main}:each:pair)"
        return Part("pairs", "", missing=missing)
    return Part("pairs", f"{counted(pairs, 'mask')}{model.alone}", (f"{model.main}:each:pair",))


def _random(model: Heads) -> Part:
    sizes = model.sizes
    says = f"{ORDERS} orders of {counted(len(sizes), 'size')}{model.under_ends}"
    return Part("random", says, (f"{model.of_ends}random:{number_text(sizes)}:0-{ORDERS - 1}",))


def _scores(model: Heads) -> Part:
    there = [name for name in BY_SCORE if name not in model.lacking]
    sizes = number_text(model.sizes)
    specs = tuple(f"{model.of_ends}grow:{CALIBRATION}:{name}:least:{sizes}" for name in there)
    missing = ", ".join(f"no {name} ({model.lacking[name]})" for name in BY_SCORE if name in model.lacking)
    says = f"{counted(len(specs), 'order')} of {counted(len(model.sizes), 'size')}{model.under_ends}"
    return Part("scores", says, specs, missing)


def _shapley(model: Heads) -> Part:
    """Return as many whole random orders as `MOST_MORE` masks allow: the sizes between those that are there."""
    more = model.heads - len(model.sizes)
    orders = ORDERS if not more else min(ORDERS, MOST_MORE // more)
    if orders < FEWEST_WHOLE_ORDERS:
        spec = f"{model.main}:grow:random:0-{FEWEST_WHOLE_ORDERS - 1}"
        missing = (
            f"{FEWEST_WHOLE_ORDERS} whole random orders of {model.heads} heads would cost "
            f"{FEWEST_WHOLE_ORDERS * more:,} more masks (--mask-spec {spec})"
        )
        return Part("shapley", "", missing=missing)
    says = f"{orders} whole random orders{model.alone}"
    return Part("shapley", says, (f"{model.main}:grow:random:0-{orders - 1}",))


PARTS: dict[str, Callable[[Heads], Part]] = {
    "layers": _layers,
    "indices": _indices,
    "nulls": _nulls,
    "heads": _heads,
    "pairs": _pairs,
    "random": _random,
    "scores": _scores,
    "shapley": _shapley,
}
"""The parts of a study, by the names that `--skip` takes."""
