"""Walks timm's models on the meta device, which holds shapes and no numbers, and describes the heads of each."""

import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import timm
import torch
from torch import nn

from headprobe.backbone.capture.layer_facts import CONTRIBUTION, LayerFacts, layer_facts
from headprobe.backbone.heads.find import find_heads
from headprobe.backbone.heads.layout import AttentionLayer, HeadLayout
from headprobe.backbone.heads.sites import one_head_by_design, site_of
from headprobe.backbone.places import PLACES
from headprobe.backbone.preparation import data_config
from headprobe.backbone.weights import BUNDLED, ModelSource, create_backbone
from headprobe.catalog.families import NO_HEADS, FamilyTable, ModelRecord, Tally
from headprobe.errors import UsageError
from headprobe.metrics.attention.offsets import WITHOUT_MAP
from headprobe.metrics.attention.statistics import AttentionStatistics
from headprobe.metrics.spectrum.spectra import WITHOUT_SPECTRUM

# Statistics of a head that are not in `headprobe.metrics.attention.statistics`: its offset map, and its output by
# frequency.
OFFSET_MAP, SPECTRUM = "offset_map", "spectrum"


CASCADE = "the head's output stays an input of the next head of its layer"

Progress = Callable[[int, int], None]
"""Takes how many models have been walked, and how many there are."""


def survey(names: Sequence[str] | None = None, workers: int = 1, progress: Progress | None = None) -> FamilyTable:
    """Walk timm's models, each built and run once on the meta device.

    Args:
        names: Models to walk; None for all of `timm.list_models()`, which take some minutes.
        workers: Processes that walk at the same time.
        progress: Called after every model.
    """
    chosen = list(timm.list_models() if names is None else names)
    records: list[ModelRecord] = []
    for record in _walked(chosen, workers):
        records.append(record)
        if progress is not None:
            progress(len(records), len(chosen))
    return FamilyTable.of(timm.__version__, records)


def _walked(names: list[str], workers: int) -> Iterator[ModelRecord]:
    """Walk models, in the order given."""
    if workers == 1:
        yield from map(walk, names)
        return
    with multiprocessing.get_context("spawn").Pool(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.imap(walk, names, chunksize=2)


@cache
def family_of_names() -> dict[str, str]:
    """Map each of timm's names to its timm family: the module of `timm.models` that holds it."""
    return {name: module for module in timm.list_modules() for name in timm.list_models(module=module)}


def is_name(name: str) -> bool:
    """Return whether a word names a model of the installed timm, one that ships with headprobe, or one elsewhere."""
    return name in BUNDLED or timm.is_model(name) or name.lower().startswith(PLACES)


def walk(name: str) -> ModelRecord:
    """Build one of timm's models on the meta device, run it once and describe its layers.

    Args:
        name: timm's name of it, with or without the tag of its weights; or the name of a bundled model.

    Raises:
        UsageError: timm has no such model.
    """
    with torch.device("meta"):
        backbone = create_backbone(ModelSource(name, pretrained=False))
        own_module = type(backbone).__module__.rpartition(".")[2]  # timm does not list a bundled model
        family = family_of_names().get(name.partition(".")[0], own_module)
        why = _why_refused(backbone)
        if why:
            return ModelRecord(name, family, refused=why)
        try:
            layout = find_heads(backbone, data_config(backbone)["input_size"], name)
        except UsageError as error:
            return ModelRecord(name, family, refused=str(error))
        facts = layer_facts(backbone, layout)
    return ModelRecord(name, family, _by_class(layout, facts), len(layout.headless))


def _why_refused(backbone: nn.Module) -> str:
    """Return why a model has no heads, in the same words for all models; empty if it has some."""
    if any(site_of(module) is not None for module in backbone.modules()):
        return ""
    single = [what for module in backbone.modules() if (what := one_head_by_design(module)) is not None]
    return f"attention with a single head by design: {single[0]}" if single else NO_HEADS


def _by_class(layout: HeadLayout, facts: Sequence[LayerFacts]) -> dict[str, Tally]:
    """Add up a model's layers by their attention class."""
    attention = [fact.attention for fact in facts]
    undefined = [fact.undefined for fact in facts]
    reasons = AttentionStatistics(attention, layout.heads_per_layer, undefined).reasons

    found: dict[str, list[Tally]] = {}
    for layer, fact, why in zip(layout.layers, facts, reasons, strict=True):
        found.setdefault(layer.attention_class, []).append(_tally(layer, fact, dict(why)))
    return {kind: Tally.total(tallies) for kind, tallies in found.items()}


def _tally(layer: AttentionLayer, fact: LayerFacts, reasons: dict[str, str]) -> Tally:
    """Describe one layer.

    Args:
        layer: The layer.
        fact: What its statistics need to know of it.
        reasons: Why attention statistics are undefined in it, by statistic.
    """
    site = layer.site
    if not fact.outputs.on_map:
        reasons |= {SPECTRUM: WITHOUT_SPECTRUM, CONTRIBUTION: WITHOUT_SPECTRUM}
    if "attention_distance_px" in reasons:
        weights = "entropy_all_keys_nats" not in reasons
        reasons[OFFSET_MAP] = WITHOUT_MAP if weights else reasons["entropy_all_keys_nats"]

    beside = [f"the slot also holds {site.also}"] if site.also else [CASCADE] if site.cascades else []
    return Tally(
        layers=1,
        heads=layer.heads,
        one_head=int(layer.heads == 1),
        kinds={layer.kind: 1},
        maps={site.maps: 1},
        head_is=Counter([site.head_is] if site.head_is else []),
        beside=Counter(beside),
        undefined={statistic: {why: 1} for statistic, why in sorted(reasons.items())},
    )
