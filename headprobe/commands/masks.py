"""`masks`: prints which heads a spec stands for on a model, without weights and without running anything.

The bundled models are not even built, nor are those whose heads are kept: torch and timm take seconds to load.
"""

import json
import sys
from contextlib import suppress
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any

from headprobe.commands.parser import Parser
from headprobe.errors import RunError, UsageError
from headprobe.files import source_digest, write_text
from headprobe.masks.spec import MaskSpec, NamedMask
from headprobe.text import counted, ranges

BUNDLED_HEADS: dict[str, tuple[int, ...]] = {"digits_vit": (4,) * 6, "digits_swin": (2, 2, 4, 4, 8, 8)}
"""Heads of each layer of the bundled models."""

KEPT = Path("lightning_logs") / "proofs" / "heads.json"
"""Where the heads of other models are kept: beside what runs have proven of models."""


def run(words: list[str]) -> None:
    """Run the command with the words after its name.

    Raises:
        UsageError: The spec or the model's name is wrong, or they do not fit together.
    """
    parser = Parser(prog="headprobe masks", description="Print which heads a mask spec stands for.")
    parser.add_argument("spec", type=str, help="A mask spec, such as each:layer or random:0-36/6:0-4.")
    parser.add_argument("--model.name", type=str, default="digits_vit", help="timm's name of it, or a bundled one's.")
    parser.add_argument("--model.options", type=dict[str, Any], default={}, help="Arguments of timm.create_model.")
    parser.add_argument("--json", action="store_true", help="Print JSON; that of one mask is a mask for file:PATH.")
    options = parser.parse_args(words)
    spec = MaskSpec(options.spec)  # refuse a wrong spec before torch and timm load, which takes seconds
    print_masks(spec, options.model.name, dict(options.model.options), as_json=options.json)


def print_masks(spec: MaskSpec, name: str, model_options: dict[str, Any], *, as_json: bool) -> None:
    """Print every mask that `spec` stands for on the model `name`.

    Raises:
        UsageError: The model's name is wrong, or the spec does not fit it.
    """
    heads_per_layer = BUNDLED_HEADS.get(name) if not model_options else None
    if heads_per_layer is None:
        heads_per_layer = _heads_of(name, model_options)
    masks = spec.expand(heads_per_layer, name)
    if as_json and spec.needs_scores:
        raise UsageError(
            "which heads these masks hit is known once a run has calibrated, and its masks.json has them: leave --json "
            f"out, got {spec}"
        )
    if as_json:
        data = {named.name: {**named.mask.to_json(), "digest": named.mask.digest} for named in masks}
        sys.stdout.write(json.dumps(data, indent=1) + "\n")
        return
    about = "about " * (spec.needs_scores and "+" in spec)
    layers, heads = counted(len(heads_per_layer), "layer"), counted(sum(heads_per_layer), "head")
    sys.stdout.write(f"{name}: {layers}, {heads}; {spec} stands for {about}{counted(len(masks), 'mask')}\n")
    if spec.needs_scores:
        sys.stdout.write("which heads they hit is known once a run has calibrated\n")
        if "+" not in spec:  # beside other clauses the sizes are known later too
            sys.stdout.writelines(f"{named.name}  {counted(named.mask.count, 'head')}\n" for named in masks)
        return
    sys.stdout.writelines(f"{_line(named)}\n" for named in masks)


def _heads_of(name: str, model_options: dict[str, Any]) -> tuple[int, ...]:
    """Return the heads of each layer of a model, which is built for it unless they are kept."""
    key, kept = _key(name, model_options), _kept()
    if heads := kept.get(key):
        return heads

    from headprobe.backbone.heads.find import find_heads
    from headprobe.backbone.preparation import data_config
    from headprobe.backbone.weights import ModelSource, create_backbone

    backbone = create_backbone(ModelSource(name, pretrained=False, options=model_options))
    heads = find_heads(backbone, data_config(backbone)["input_size"], name).heads_per_layer
    # a name with a colon stands for a folder or a repository, whose content may change
    if ":" not in name and KEPT.parents[1].is_dir():
        with suppress(RunError):  # a disk that is full or not ours: they are found again the next time
            write_text(KEPT, json.dumps(kept | {key: heads}, indent=1) + "\n")
    return heads


def _kept() -> dict[str, tuple[int, ...]]:
    """Return the heads that are kept, by model; none where the file is missing or broken."""
    try:
        content = json.loads(KEPT.read_text(encoding="utf-8"))
        return {key: tuple(map(int, heads)) for key, heads in content.items() if min(heads) > 0}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _key(name: str, model_options: dict[str, Any]) -> str:
    """Return all that the heads of a model depend on; versions are read without loading their packages."""
    versions = [f"{package} {metadata.version(package)}" for package in ("timm", "torch")]
    asked = json.dumps(model_options, sort_keys=True, default=str)
    return " ".join([name, asked, f"headprobe {source_digest()}", *versions])


def _line(named: NamedMask) -> str:
    """Return a mask's name and its heads as layer.heads, as in `3.0-2,5`."""
    by_layer = groupby(sorted(named.mask.masked), key=lambda head: head[0])
    heads = " ".join(f"{layer}.{ranges([head for _, head in group])}" for layer, group in by_layer)
    return f"{named.name}  {counted(named.mask.count, 'head')}" + (f": {heads}" if heads else "")
