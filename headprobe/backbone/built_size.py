"""The size of images that a model in hand was built for, from where models of many origins keep it."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from headprobe.backbone.preparation import image_sides

KEPT_IN = (("patch_embed", "img_size"), ("patch_embed", "image_size"))
"""Where a module for patches keeps its image size: timm's and its kin, and others'."""

KEPT_BY_OTHERS = (("", "img_size"), ("", "image_size"), ("config", "image_size"))
"""Where models that have no timm configuration keep it: the model itself, and the configuration of transformers."""

USUAL = (3, 224, 224)


def inner_model(model: nn.Module) -> nn.Module:
    """Return the model inside of PyTorch's wrappers for several devices; any other model as it is."""
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    return model


def timm_config(model: nn.Module) -> dict[str, Any]:
    """Return timm's configuration of a model in hand, by its newer or its older name; empty where it has none."""
    inner = inner_model(model)
    for name in ("pretrained_cfg", "default_cfg"):
        config = getattr(inner, name, None)
        if isinstance(config, Mapping) and config:
            return dict(config)
        if hasattr(config, "input_size"):  # timm's own class for it
            return dict(vars(config))
    return {}


def built_size(model: nn.Module) -> tuple[int, int, int]:
    """Return `(channels, height, width)` of the images that a model seems to be built for.

    What a model keeps of it and cannot be understood is passed over. Without any hint it is ImageNet's usual size.
    """
    inner, config = inner_model(model), timm_config(model)
    channels, height, width = _whole(config.get("input_size")) or USUAL
    for part, name in (*KEPT_IN, *(() if config else KEPT_BY_OTHERS)):
        sides = image_sides(getattr(inner, part, None) if part else inner, name, channels)
        if sides is not None:
            return (channels, *sides)
    return (channels, height, width)


def _whole(size: Any) -> tuple[int, int, int] | None:
    """Return a size if it is three whole numbers of 1 or more."""
    if isinstance(size, list | tuple) and len(size) == 3 and all(isinstance(n, int) and n > 0 for n in size):
        return (size[0], size[1], size[2])
    return None
