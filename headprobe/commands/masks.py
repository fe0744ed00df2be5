"""`masks`: prints which heads a spec stands for on a model, without running anything."""

import json
import sys
from typing import Any

import jsonargparse

from headprobe.backbone.heads import find_heads
from headprobe.backbone.weights import ModelSource, create_backbone, data_config
from headprobe.masks.head_mask import HeadMask
from headprobe.masks.spec import MaskSpec, NamedMask

MOST_HEADS = 12
"""Heads that a line shows; `--json` has all."""


def run(words: list[str]) -> None:
    """Run the command with the words after its name."""
    parser = jsonargparse.ArgumentParser(prog="headprobe masks", description=__doc__)
    parser.add_argument("spec", type=str, help="A mask spec, such as each:layer or random:0-36/6:0-4.")
    parser.add_argument("--model.name", type=str, default="digits_vit", help="timm's name of the model, or a bundled one.")
    parser.add_argument("--model.options", type=dict[str, Any], default={}, help="Further arguments of timm.create_model.")
    parser.add_argument("--json", action="store_true", help="Print JSON, as file: reads it.")
    options = parser.parse_args(words)
    print_masks(options.spec, options.model.name, dict(options.model.options), as_json=options.json)


def print_masks(spec: str, name: str, model_options: dict[str, Any], *, as_json: bool) -> None:
    """Print every mask that `spec` expands to on the model `name`.

    Raises:
        UsageError: The spec or the model's name is wrong, or they do not fit together.
    """
    backbone = create_backbone(ModelSource(name, pretrained=False, options=model_options))
    layout = find_heads(backbone, data_config(backbone)["input_size"], name)
    masks = MaskSpec(spec).expand(layout.heads_per_layer, name)
    if as_json:
        data = {named.name: {**named.mask.to_json(), "digest": named.mask.digest} for named in masks}
        sys.stdout.write(json.dumps(data, indent=1) + "\n")
        return
    heads = sum(layout.heads_per_layer)
    sys.stdout.write(f"{name}: {len(layout.layers)} layers, {heads} heads; {spec} stands for {len(masks)} mask(s)\n")
    sys.stdout.writelines(f"{line}\n" for line in map(_line, masks))


def _line(named: NamedMask) -> str:
    return f"{named.name}  {named.mask.count} head(s): {_heads_text(named.mask)}"


def _heads_text(mask: HeadMask) -> str:
    """Return the masked heads as layer.head, the first ones if they are many."""
    heads = [f"{layer}.{head}" for layer, head in sorted(mask.masked)]
    return " ".join(heads[:MOST_HEADS]) + (" ..." if len(heads) > MOST_HEADS else "")


