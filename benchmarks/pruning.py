"""How fast a pruned model is beside the masked and the whole one: ``python -m benchmarks.pruning --threads 1``.

All cases take turns in one run, so that what else the machine does meets all of them alike. Masked is the model under
headprobe's hooks, as a user of `headprobe.ablate` has it. Torch-Pruning, where it is installed, removes the same heads.
"""

import argparse
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import headprobe
from benchmarks import machine
from benchmarks.describe import SHARED
from benchmarks.report import markdown, publish, refuse_below_one
from headprobe.backbone.built_size import built_size
from headprobe.backbone.heads.find import find_heads
from headprobe.backbone.sandbox import perturbed, relative
from headprobe.backbone.weights import BUNDLED, ModelSource, create_backbone
from headprobe.errors import RunError, UsageError
from headprobe.masks.spec import MaskSpec, expand_all
from headprobe.pruning.cost import passes_of

WHOLE, MASKED, OURS, THEIRS = "original", "masked", "pruned", "Torch-Pruning"
SHARES = (25, 50, 75)
BATCHES = (1, 64)
TOLERANCE, CHANGED = 1e-5, 1e-4
"""Of logits, relative to the largest: who differs by more is not compared, and a mask must change at least so much."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table and write the numbers."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    try:
        model, weights = load(options.model, options.weights)
        rows = [row for share in options.shares for row in measure(model, share, options)]
    except (UsageError, RunError) as error:
        raise SystemExit(str(error)) from None
    setting = {
        "machine": machine.line(machine.describe(), options.threads),
        "model": options.model,
        "weights": weights,
        "pairs": options.pairs,
        "seed": options.seed,
    }
    publish(table(setting, rows), setting, rows, options.json)
    if find_spec("torch_pruning") is None:
        print(f"\n{THEIRS} is not installed (pip install torch-pruning): its lines are left out")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pruning", description=__doc__)
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="name of a timm model, or a bundled one")
    parser.add_argument("--weights", type=Path, help="its weights (safetensors); by default DeiT-Ti's in ../shared")
    parser.add_argument("--shares", type=int, nargs="+", default=SHARES, help="per cent of the heads to remove")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="images of noise per pass")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pairs", type=int, default=15, help="rounds, each of them one timing of every case")
    parser.add_argument("--seed", type=int, default=0, help="of the heads, which are drawn at random")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args(arguments)
    refuse_below_one(parser, options, "threads", "pairs")
    if min(options.batches) < 1:
        parser.error(f"--batches must be at least 1, got {min(options.batches)}")
    if not all(0 < share < 100 for share in options.shares):
        parser.error(f"--shares must be between 0 and 100, got {', '.join(map(str, options.shares))}")
    return options


def load(name: str, weights: Path | None) -> tuple[nn.Module, str]:
    """Return a model in evaluation mode, and which weights it has."""
    if weights is None and name == "deit_tiny_patch16_224" and SHARED.exists():
        weights = SHARED
    torch.manual_seed(0)
    bundled = name in BUNDLED
    model = create_backbone(ModelSource(name, None if weights is None else str(weights), bundled)).eval()
    if weights is None and not bundled:
        perturbed(model)  # fresh weights barely answer to masks, and the logits are to show that heads are gone
        return model, "random"
    return model, "its own" if weights is None else weights.parent.name


# -- the same heads, masked and removed --------------------------------------------------------------------------------


def measure(model: nn.Module, share: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield what each case takes without so many per cent of the heads, by batch size."""
    heads = sum(find_heads(model, built_size(model), options.model).heads_per_layer)
    gone = max(1, round(heads * share / 100))
    spec = f"random:{gone}:{options.seed}"
    models = cases(model, spec)
    with headprobe.ablate(models[MASKED], spec), torch.inference_mode():
        refuse_different(models)
        for batch in options.batches:
            images = noise(model, batch)
            times, passes = take_turns({name: passing(one, images) for name, one in models.items()}, options.pairs)
            for name, seconds in times.items():
                parameters = sum(one.numel() for one in models[name].parameters())
                case = {"heads": f"{gone} of {heads}", "batch": batch, "passes": passes, "case": name}
                yield case | {"parameters": parameters} | numbers(seconds, times, batch)


def cases(model: nn.Module, spec: str) -> dict[str, nn.Module]:
    """Return the whole model, one to be masked, and those that lose the heads for good."""
    found = {WHOLE: model, MASKED: copy.deepcopy(model), OURS: headprobe.remove_heads(model, spec)}
    if find_spec("torch_pruning") is not None:
        found[THEIRS] = by_torch_pruning(model, spec)
    return found


def by_torch_pruning(model: nn.Module, spec: str) -> nn.Module:
    """Return a copy without the heads, by Torch-Pruning's graph of what hangs on what; of timm's plain ViTs.

    Its pruner takes as many heads of each layer, by a score, so its graph is asked for the mask's own. It leaves no
    layer without heads: there the first one stays, and its columns of the projection become zero.
    """
    torch_pruning: Any = import_module("torch_pruning")
    smaller = copy.deepcopy(model)
    layout = find_heads(smaller, built_size(smaller), "model")
    (variant,) = expand_all([MaskSpec(spec)], layout.heads_per_layer, "model")
    graph = torch_pruning.DependencyGraph().build_dependency(smaller, example_inputs=noise(smaller, 1), verbose=False)
    for layer, kept in zip(layout.layers, variant.mask.mask.keep().tolist(), strict=True):
        attention: Any = smaller.get_submodule(layer.name)
        dim, own = attention.head_dim, kept[: layer.heads]
        if not any(own):
            own[0] = True
            with torch.no_grad():
                attention.proj.weight[:, :dim] = 0
        channels = [head * dim + place for head, here in enumerate(own) if not here for place in range(dim)]
        if channels:  # of queries; the graph finds those of keys, values and the projection
            group = graph.get_pruning_group(attention.qkv, torch_pruning.prune_linear_out_channels, idxs=channels)
            group.prune()
        attention.num_heads = sum(own)
        attention.attn_dim = attention.num_heads * dim
    return smaller


def refuse_different(models: dict[str, nn.Module]) -> None:
    """End where models without the heads give other logits than the masked one, or the mask changes nothing.

    Raises:
        RunError: With who differs, and how much.
    """
    images = noise(models[WHOLE], 2)
    logits = {name: model(images) for name, model in models.items()}
    if relative(logits[MASKED], logits[WHOLE]) < CHANGED:
        raise RunError("the mask changes no logit, so it cannot show that heads are gone: give other --weights")
    for name in logits.keys() - {WHOLE, MASKED}:
        difference = relative(logits[name], logits[MASKED])
        if not difference <= TOLERANCE:
            raise RunError(f"{name} gives other logits than the masked model, by {difference:.1e} of the largest")


def noise(model: nn.Module, batch: int) -> Tensor:
    """Return images of noise `[batch, channels, height, width]`."""
    return torch.randn(batch, *built_size(model), generator=torch.Generator().manual_seed(0))


def passing(model: nn.Module, images: Tensor) -> Callable[[int], float]:
    """Return what times forward passes, and says how many seconds one took on average."""

    def seconds(passes: int) -> float:
        began = time.perf_counter()
        for _ in range(passes):
            model(images)
        return (time.perf_counter() - began) / passes

    return seconds


def take_turns(timings: dict[str, Callable[[int], float]], rounds: int) -> tuple[dict[str, list[float]], int]:
    """Return the seconds of a pass of each case and round, and of how many passes each timing is the mean.

    Two rounds to warm up say how long a pass takes; the order is reversed every round.
    """
    passes = passes_of([timing(1) for _ in range(2) for timing in timings.values()])
    times: dict[str, list[float]] = {name: [] for name in timings}
    order = list(timings)
    for _ in range(rounds):
        order.reverse()
        for name in order:
            times[name].append(timings[name](passes))
    return times, passes


# -- what is said ------------------------------------------------------------------------------------------------------


def numbers(seconds: Sequence[float], times: dict[str, list[float]], batch: int) -> dict[str, Any]:
    """Return latency and throughput, and how many times as fast a case is as the whole and the masked model."""
    found: dict[str, Any] = {"milliseconds": 1000 * median(seconds), "images_per_second": batch / median(seconds)}
    for name in (WHOLE, MASKED):
        ratios = sorted(other / one for one, other in zip(seconds, times[name], strict=True))
        middle = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        found |= {f"speed_{name}": median(ratios), f"speed_{name}_middle_half": middle}
    return found


def table(setting: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """Return the numbers as a table in Markdown."""
    columns = ("heads removed", "batch", "case", "parameters", "ms", "images/s", f"x {WHOLE}", f"x {MASKED}", "passes")
    lines = []
    for row in rows:
        speeds = [
            f"{row[f'speed_{name}']:.2f} [{', '.join(f'{end:.2f}' for end in row[f'speed_{name}_middle_half'])}]"
            for name in (WHOLE, MASKED)
        ]
        times = (f"{row['milliseconds']:.2f}", f"{row['images_per_second']:.1f}")
        case = (row["heads"], str(row["batch"]), row["case"], f"{row['parameters']:,}")
        lines.append((*case, *times, *speeds, str(row["passes"])))
    return markdown(setting, columns, lines)


if __name__ == "__main__":
    main()
