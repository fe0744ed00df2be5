"""Which heads of its architecture a pruned model still has: kept with the model, and written into its `config.json`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from headprobe.backbone.heads.sites import site_of
from headprobe.backbone.pruned.no_heads import NoHeads
from headprobe.backbone.pruned.shrink import shrink_layer
from headprobe.errors import UsageError

ATTRIBUTE = "headprobe_pruned"
"""Where a model in memory keeps its record: layers by name."""


@dataclass(frozen=True)
class PrunedLayer:
    """What is left of one attention layer.

    Attributes:
        heads: Heads that the architecture has there.
        kept: Numbers of those that are left.
        bias: The output projection has a bias, whether the architecture's has one or not.
    """

    heads: int
    kept: tuple[int, ...]
    bias: bool


def record_of(backbone: nn.Module) -> dict[str, PrunedLayer]:
    """Return the layers of a model from which heads were removed, by name; empty for a model as timm builds it."""
    record: dict[str, PrunedLayer] = getattr(backbone, ATTRIBUTE, {})
    return dict(record)


def add_to_record(backbone: nn.Module, name: str, heads: int, kept: Sequence[int]) -> None:
    """Note that a layer, changed already, has only some of the heads that it had a moment ago.

    Args:
        backbone: The model.
        name: The layer's qualified name.
        heads: Heads that it had.
        kept: Those that are left, by their numbers of then.
    """
    record = record_of(backbone)
    before = record.get(name, PrunedLayer(heads, tuple(range(heads)), False))
    left: Any = backbone.get_submodule(name)
    bias = isinstance(left, NoHeads) or left.proj.bias is not None
    record[name] = PrunedLayer(before.heads, tuple(before.kept[head] for head in kept), bias)
    setattr(backbone, ATTRIBUTE, record)


def layers_to_json(record: Mapping[str, PrunedLayer]) -> dict[str, Any]:
    """Return a record as JSON values."""
    return {name: {**asdict(layer), "kept": list(layer.kept)} for name, layer in record.items()}


def layers_from_json(written: Any, where: str) -> dict[str, PrunedLayer]:
    """Read what `layers_to_json` gives.

    Args:
        written: What JSON gave.
        where: Its file, for messages.

    Raises:
        UsageError: It has another shape.
    """
    if not isinstance(written, Mapping):
        raise UsageError(f"{where}: layers of a pruned model must be an object, got {written!r}")
    found = {}
    for name, layer in written.items():
        known = isinstance(layer, Mapping) and layer.keys() >= {"heads", "kept", "bias"}
        heads: Any = layer["heads"] if known else None
        kept: Any = layer["kept"] if known else None
        numbers = isinstance(kept, list) and all(type(number) is int for number in (heads, *kept))
        if not numbers or kept != sorted({head for head in kept if 0 <= head < heads}):
            raise UsageError(
                f'{where}: a layer of a pruned model must be {{"heads": 4, "kept": [0, 2], "bias": true}}, got '
                f"{name!r}: {layer!r}"
            )
        found[str(name)] = PrunedLayer(heads, tuple(kept), bool(layer["bias"]))
    return found


def with_fewer_heads(backbone: nn.Module, record: Mapping[str, PrunedLayer], where: str) -> nn.Module:
    """Give a model as timm builds it the heads of a record, in place; its weights are then still to be loaded.

    Args:
        backbone: The model.
        record: Its layers that have fewer heads.
        where: The record's file, for messages.

    Raises:
        UsageError: The model has no such layer, or one with another number of heads.
    """
    modules = dict(backbone.named_modules())
    for name, layer in record.items():
        site = site_of(modules[name]) if name in modules else None
        heads = site.heads(modules[name]) if site is not None else "no such layer"
        if heads != layer.heads:
            raise UsageError(
                f"{where}: the architecture must have the layers of the pruned model, {name!r} with {layer.heads} "
                f"heads: was it written with other options, or by another timm? got {heads}"
            )
        shrink_layer(backbone, name, layer.kept, layer.bias)
    setattr(backbone, ATTRIBUTE, dict(record))
    return backbone
