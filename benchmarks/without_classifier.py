"""Tries every plain ViT of timm that has no classifier: ``python -m benchmarks.without_classifier --json found.json``.

Each is built with random weights, cut to two blocks at a small image size, and `test --model.classifier none` judges
two images by its pooled feature: no network is needed. A model that two blocks do not fit is tried with all of them, up
to `--largest` parameters. Checkpoints of one architecture with as many outputs are one model here.
"""

import argparse
import gc
import logging
import math
import re
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import partial
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch

from benchmarks.report import markdown, publish, refuse_below_one
from headprobe.backbone.outputs import FINE_TUNED, TOWERS
from headprobe.catalog.survey import family_of_names
from headprobe.data.datamodule import ImageNetDataModule
from headprobe.errors import RunError, UsageError
from headprobe.module import HeadProbe
from headprobe.text import first_line
from headprobe.trainer import ProbeTrainer

PLAIN = (
    *("vision_transformer", "eva", "naflexvit", "vision_transformer_hybrid", "vision_transformer_sam"),
    *("deepseek_vit", "gemma4_vit", "qwen3_vit"),
)
"""timm families of plain ViTs: equal blocks, one after the other."""

BLOCKS = 2
LARGEST = 500
"""Millions of parameters: four bytes each, of which proofs hold a few copies."""

SIDE = 64
"""Pixels, or the next multiple of the patches."""

OWN_SIDE = {"deepseek_vit": 84}
"""Six patches of 14, which it joins three by three; its names do not say so."""

NO_SIZE = ("naflexvit",)
"""timm families that take patches of any image: the size is one of the preparation alone."""

FAILURES = (UsageError, RunError, RuntimeError, TypeError, ValueError, AssertionError, LookupError)


@dataclass(frozen=True)
class Found:
    """What came of one model.

    Attributes:
        family: Its timm family.
        name: A checkpoint of it.
        checkpoints: How many checkpoints are of this architecture, with as many outputs.
        blocks: `BLOCKS`, or "all".
        parameters: Millions of what was run.
        features: Width of the pooled feature.
        embedding: Whether that is the output of a projection in place of a classifier.
        distances: Mean distance of the feature under the mask of each layer.
        seconds: From building to the end.
        why: Why it was not run, or not rightly; empty where it was.
    """

    family: str
    name: str
    checkpoints: int
    blocks: str = ""
    parameters: float = 0.0
    features: int = 0
    embedding: bool = False
    distances: tuple[float, ...] = ()
    seconds: float = 0.0
    why: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Try the models, print a table and write the findings; return 1 if one failed."""
    options = parse(arguments)
    chosen = {name: count for name, count in names().items() if fnmatchcase(name, options.pattern)}
    if not chosen:
        raise SystemExit(f"no name without a classifier fits {options.pattern!r}")
    found = []
    for one in _tried(chosen, options.largest, options.workers):
        found.append(one)
        print(f"{len(found)}/{len(chosen)} {one.name}: {one.why or 'ran'} ({one.seconds:.1f} s)", flush=True)
    setting = {
        "timm": timm.__version__,
        "torch": torch.__version__,
        "names": len(found),
        "checkpoints": sum(one.checkpoints for one in found),
        "run": sum(not one.why for one in found),
        "largest, millions of parameters": options.largest,
    }
    publish(table(found, setting), setting, [asdict(one) for one in found], options.json)
    return int(any(one.why for one in found))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.without_classifier", description=__doc__)
    parser.add_argument("pattern", nargs="?", default="*", help="names to try, such as '*dinov3*'")
    parser.add_argument("--largest", type=int, default=LARGEST, help="millions of parameters of what is run, at most")
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--json", type=Path, help="also write the findings to this file")
    options = parser.parse_args(arguments)
    refuse_below_one(parser, options, "largest", "workers")
    return options


def names() -> dict[str, int]:
    """Map a checkpoint of each model without a classifier to the number of checkpoints that it stands for.

    A tower of CLIP has a projection in place of a classifier: its name says so, as in a run.
    """
    families = family_of_names()
    first: dict[tuple[str, int], str] = {}
    counts: Counter[str] = Counter()
    for name in timm.list_models(pretrained=True):
        architecture, _, tag = name.partition(".")
        classes = timm.get_pretrained_cfg(name).num_classes
        tower = TOWERS.search(name) and not FINE_TUNED.search(tag)
        if families[architecture] in PLAIN and (not classes or tower):
            counts[first.setdefault((architecture, classes), name)] += 1
    return dict(counts)


def small(name: str) -> dict[str, Any]:
    """Return the options that make a model small, beside its number of blocks."""
    patch = re.search(r"patch(\d+)", name)
    side = math.ceil(SIDE / int(patch[1])) * int(patch[1]) if patch else 2 * SIDE
    family = family_of_names()[name.partition(".")[0]]
    side = OWN_SIDE.get(family, side)
    if family in NO_SIZE:
        return {"pretrained_cfg_overlay": {"input_size": [3, side, side]}}
    return {"img_size": side}


def _tried(chosen: Mapping[str, int], largest: int, workers: int) -> Iterator[Found]:
    """Try models, in the order given."""
    one = partial(attempt, largest=largest)
    if workers == 1:
        yield from map(one, chosen.items())
        return
    with get_context("spawn").Pool(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.imap(one, chosen.items(), chunksize=1)


def attempt(name_and_count: tuple[str, int], largest: int = LARGEST) -> Found:
    """Try a model with two blocks, and where these do not fit it with all of them."""
    name, count = name_and_count
    family, began = family_of_names()[name.partition(".")[0]], time.perf_counter()
    start = Found(family, name, count)
    whys = []
    for blocks, options in (str(BLOCKS), {"depth": BLOCKS}), ("all", {}):
        try:
            found = judge(name, {**small(name), **options}, largest)
        except FAILURES as error:
            whys.append(f"{blocks} blocks: {first_line(error)}")
            continue
        finally:
            gc.collect()
        return Found(family, name, count, blocks, **found, seconds=time.perf_counter() - began)
    return Found(**(asdict(start) | {"why": "; ".join(whys), "seconds": time.perf_counter() - began}))


def judge(name: str, options: Mapping[str, Any], largest: int) -> dict[str, Any]:
    """Judge two of the bundled images under the mask of each layer, by the pooled feature.

    Raises:
        UsageError: It is larger than `largest`, or headprobe refuses it.
        RunError: A feature is not finite, or a mask does not move it.
    """
    with torch.device("meta"):
        shapes = timm.create_model(name, **options).parameters()
        millions = sum(parameter.numel() for parameter in shapes) / 1e6
    if millions > largest:
        raise UsageError(f"at most {largest} million parameters are run, got {millions:,.0f}")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    with warnings.catch_warnings(), TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")
        probe = HeadProbe(name, pretrained=False, options=dict(options), classifier="none")
        probe.choose_masks("each:layer")
        data = ImageNetDataModule(max_images=2, num_workers=0, batch_size=2)
        trainer = ProbeTrainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=folder)
        trainer.test(probe, datamodule=data, verbose=False)
    scores = probe.feature_scores
    if scores is None or scores.nonfinite.any() or scores.feature_cosine[0] != 1:
        raise RunError("the feature is not finite")
    distances = tuple(float(distance) for distance in scores.feature_distance[1:])
    if not min(distances) > 0:
        raise RunError(f"each mask must move the feature, got distances {distances}")
    embedding = bool(getattr(probe.backbone, "num_classes", 0))
    return {"parameters": millions, "features": probe.outputs.features, "embedding": embedding, "distances": distances}


def table(found: Sequence[Found], setting: dict[str, Any]) -> str:
    """Return the totals, a row for each timm family, and a line for each name that was not run."""
    columns = ("timm family", "names", "checkpoints", "run", "of them whole", "embedding", "features")
    rows = []
    for family in dict.fromkeys(one.family for one in found):
        own = [one for one in found if one.family == family]
        ran = [one for one in own if not one.why]
        numbers = (
            len(own),
            sum(one.checkpoints for one in own),
            len(ran),
            sum(one.blocks == "all" for one in ran),
            sum(one.embedding for one in ran),
            " to ".join(map(str, _ends([one.features for one in ran]))),
        )
        rows.append((family, *map(str, numbers)))
    missing = [f"- `{one.name}`: {one.why}" for one in found if one.why]
    return "\n".join([markdown(setting, columns, rows), *(["", "Not run:", *missing] if missing else [])])


def _ends(values: Sequence[int]) -> list[int]:
    return sorted({min(values), max(values)}) if values else []


if __name__ == "__main__":
    raise SystemExit(main())
