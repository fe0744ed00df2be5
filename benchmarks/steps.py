"""What each step of the sweep's growing pass gains: ``python -m benchmarks.steps --budgets 37 74 --threads 1``.

All single heads of a model, or the masks of a spec, on images of noise, in one process: one forward pass per mask with
plain hooks, then the growing pass with nothing left out, with shared attention cores, with pooled tokens alone behind
the last attention, with only their queries in it, and with rows that masks share until they part. All take turns in
every round, and ratios are printed only where all logits are equal.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_check import masks_of
from benchmarks.peers.common import attentions, head_zeroed
from benchmarks.report import markdown, publish, ratios, refuse_below_one
from headprobe.backbone.growing.growing_pass import GrowingPass
from headprobe.backbone.growing.joins import find_joins
from headprobe.backbone.growing.shortcuts import NO_SHORTCUTS, Shortcuts
from headprobe.backbone.growing.trials import find_shortcuts
from headprobe.backbone.heads.find import find_heads
from headprobe.backbone.heads.layout import HeadLayout
from headprobe.backbone.preparation import data_config
from headprobe.backbone.sandbox import perturbed
from headprobe.backbone.weights import BUNDLED, ModelSource, create_backbone
from headprobe.errors import RunError, UsageError

PLAIN = "plain hooks, a pass per mask"
SHARED = Path(__file__).resolve().parents[2] / "shared" / "deit_tiny" / "model.safetensors"
TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest, with which times are compared."""
Way = Callable[[Tensor], Tensor]
"""Gives the logits `[1 + masks, images, classes]` of images, the baseline first."""
Times = dict[str, list[tuple[float, float]]]
"""Seconds on the clock and CPU seconds of each round, by case."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table and write the numbers; return 1 if logits differ."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    try:
        model = load(options)
        layout = find_heads(model, data_config(model)["input_size"], options.model)
        keep = masks_of(layout, torch.device("cpu"), options.mask_spec)
        ways = all_ways(model, layout, keep, options)
    except (UsageError, RunError) as error:
        raise SystemExit(str(error)) from None
    images = torch.randn(options.images, *layout.input_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        apart = differences(ways, images)
        wrong = [name for name, difference in apart.items() if not difference <= TOLERANCE]
        rows = [] if wrong else compare(take_turns(ways, images, options.repeats), apart, options.images)
    setting = {
        "model": options.model,
        "weights": "random" if source_of(options).weights is None and options.model not in BUNDLED else "trained",
        "mask spec": options.mask_spec,
        "masks": len(keep),
        "images": options.images,
        "batch of plain hooks": options.batch,
        "threads": options.threads,
        "repeats": options.repeats,
        "torch": torch.__version__,
    }
    said = f"No ratios, for logits differ from {PLAIN}: {', '.join(wrong)}" if wrong else table(setting, rows)
    publish(said, setting | {"differences": apart}, rows, options.json)
    return int(bool(wrong))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=__doc__)
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="a timm ViT or Swin, or a bundled model")
    parser.add_argument("--weights", type=Path, help="its weights (safetensors); by default DeiT-Ti's in ../shared")
    parser.add_argument("--mask-spec", default="each:head", help="the masks, as test takes them")
    parser.add_argument("--budgets", type=int, nargs="+", default=[80], help="row budgets of the growing pass")
    parser.add_argument("--images", type=int, default=16, help="images of noise in each round")
    parser.add_argument("--batch", type=int, default=16, help="images per forward pass of the plain hooks")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5, help="rounds, each of them all images in every way")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args(arguments)
    refuse_below_one(parser, options, "images", "batch", "threads", "repeats")
    if min(options.budgets) < 1:
        parser.error(f"--budgets must be at least 1, got {min(options.budgets)}")
    return options


def source_of(options: argparse.Namespace) -> ModelSource:
    """Return what the model is built from."""
    usual = SHARED if options.model == "deit_tiny_patch16_224" and SHARED.exists() else None
    weights = options.weights or usual
    return ModelSource(options.model, None if weights is None else str(weights), options.model in BUNDLED)


def load(options: argparse.Namespace) -> Any:
    """Return the model; random weights are perturbed, for fresh ones barely answer to masks."""
    source = source_of(options)
    torch.manual_seed(0)
    model = create_backbone(source)
    return (model if source.weights or source.name in BUNDLED else perturbed(model)).eval()


def all_ways(model: Any, layout: HeadLayout, keep: Tensor, options: argparse.Namespace) -> dict[str, Way]:
    """Return what is compared, by name; a step that the model does not allow is left out."""
    joins, companies, calls = find_joins(model, layout)
    ways: dict[str, Way] = {PLAIN: partial(by_hooks, model, keep, options.batch)}
    found = find_shortcuts(model, layout, joins, companies, calls)
    for name, shortcuts in steps(found).items():
        for budget in options.budgets:
            growing = GrowingPass(model, layout, joins, keep, shortcuts)
            rows = growing.plan(options.images, budget).most_rows
            ways[f"{name}, {rows} rows"] = partial(by_growing, growing, budget)
    return ways


def steps(found: Shortcuts) -> dict[str, Shortcuts]:
    """Return what each step leaves out, everything before it included."""
    alone = replace(found, beginnings=False)
    cores = replace(alone, pooled=None)
    of_pooled = found.pooled and replace(found.pooled, queries=False)
    each = {
        "growing pass": NO_SHORTCUTS,
        "+ shared cores": cores,
        "+ pooled tokens": replace(cores, pooled=of_pooled),
        "+ only pooled queries": alone,
        "+ shared beginnings": found,
    }
    return {name: one for place, (name, one) in enumerate(each.items()) if one not in list(each.values())[:place]}


def by_hooks(model: Any, keep: Tensor, batch: int, images: Tensor) -> Tensor:
    """Return the logits of one pass without a mask and one for each mask, whose heads plain hooks zero."""
    layers, found = attentions(model), []
    for part in torch.split(images, batch):
        logits = [model(part)]
        for mask in keep:
            with ExitStack() as stack:
                for layer, head in (~mask).nonzero().tolist():
                    stack.enter_context(head_zeroed(layers[layer], head))
                logits.append(model(part))
        found.append(torch.stack(logits))
    return torch.cat(found, dim=1)


def by_growing(growing: GrowingPass, budget: int, images: Tensor) -> Tensor:
    """Return the same logits of growing passes within a row budget."""
    plan = growing.plan(len(images), budget)
    with growing:
        return torch.cat([growing.logits(part, plan) for part in torch.split(images, plan.images)], dim=1)


def differences(ways: dict[str, Way], images: Tensor) -> dict[str, float]:
    """Return for each case the largest difference from plain passes, relative to the largest logit: a warm-up too."""
    expected = ways[PLAIN](images)
    if any(torch.equal(masked, expected[0]) for masked in expected[1:]):
        raise SystemExit("a mask changes nothing; the comparison would prove nothing")
    return {name: float((way(images) - expected).abs().max() / expected.abs().max()) for name, way in ways.items()}


def take_turns(ways: dict[str, Way], images: Tensor, repeats: int) -> Times:
    """Return the times of each case and round; who begins changes with every round."""
    times: Times = {name: [] for name in ways}
    order = list(ways)
    for _ in range(repeats):
        for name in order:
            began, began_cpu = time.perf_counter(), time.process_time()
            ways[name](images)
            times[name].append((time.perf_counter() - began, time.process_time() - began_cpu))
        order = [*order[1:], order[0]]
    return times


def compare(times: Times, apart: dict[str, float], images: int) -> list[dict[str, Any]]:
    """Return for each case what an image takes, least, and relative to plain hooks."""
    rows = []
    for name, of_case in times.items():
        row: dict[str, Any] = {"case": name, "difference": apart[name]}
        for kind, place in (("clock", 0), ("cpu", 1)):
            mine, plain = ([one[place] for one in found] for found in (of_case, times[PLAIN]))
            row[f"{kind}_ms"] = 1000 * min(mine) / images
            row |= {f"{kind}_{key}": value for key, value in ratios(mine, plain).items()}
            row[f"{kind}_seconds"] = mine
        rows.append(row)
    return rows


def table(setting: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """Return the numbers as a table in Markdown."""
    columns = ("case", "clock: ms per image", "minima", "median", "CPU: ms", "minima", "median", "logits differ by")
    lines = []
    for row in rows:
        cells = [row["case"]]
        for kind in ("clock", "cpu"):
            cells += [f"{row[f'{kind}_ms']:.1f}"]
            cells += [f"{row[f'{kind}_{key}']:.3f}" for key in ("ratio_of_minima", "median_ratio")]
        lines.append((*cells, f"{row['difference']:.0e}" if row["difference"] else "0"))
    return markdown(setting, columns, lines)


if __name__ == "__main__":
    raise SystemExit(main())
