"""How images are prepared for a model: timm's evaluation transform of it, checked entry by entry, and normalisation."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from headprobe.errors import UsageError
from headprobe.text import Decision

OVERLAY = "pretrained_cfg_overlay"
"""The option of `timm.create_model` that replaces entries of a configuration."""

INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")


def data_config(backbone: nn.Module, train_size: bool = False) -> dict[str, Any]:
    """Return timm's evaluation transform of a model: `input_size`, `mean`, `std`, `interpolation`, `crop_pct`, ...

    Image size and crop are those that timm tests with, as its validate.py does. The size of a model that was built for
    one size is that one, even where an option changed it.

    Args:
        backbone: A timm model.
        train_size: Size and crop of training, where timm tests the model with others.
    """
    config: dict[str, Any] = dict(resolve_model_data_config(backbone, use_test_size=not train_size))
    patches = getattr(backbone, "patch_embed", None)
    size = image_sides(patches, "img_size", config["input_size"][0])
    if size is not None and not (_tests_elsewhere(backbone, train_size) and _takes_any_size(backbone, patches)):
        config["input_size"] = (config["input_size"][0], *size)
    return config


def image_sides(holder: Any, name: str, channels: int) -> tuple[int, int] | None:
    """Return the height and width of images that a module keeps in an attribute.

    Args:
        holder: A module, or None.
        name: The attribute. One number means a square; of three numbers the first must be the channels.
        channels: Channels of an image.

    Returns:
        None where there is no such attribute, or it holds anything that cannot be understood.
    """
    try:
        kept = getattr(holder, name)
        numbers = torch.as_tensor(kept, dtype=torch.float64, device="cpu").flatten().tolist()
    except (AttributeError, RuntimeError, TypeError, ValueError, LookupError):  # a property may raise anything
        return None
    if isinstance(kept, bool) or not all(number >= 1 and number.is_integer() for number in numbers):
        return None
    sides = [int(number) for number in numbers]
    if len(sides) == 3 and sides[0] == channels:
        sides = sides[1:]
    return (sides[0], sides[-1]) if len(sides) in (1, 2) else None


def _tests_elsewhere(backbone: nn.Module, train_size: bool) -> bool:
    config: Any = getattr(backbone, "pretrained_cfg", None) or {}
    return not train_size and config.get("test_input_size") is not None


def _takes_any_size(backbone: nn.Module, patches: Any) -> bool:
    return bool(getattr(backbone, "dynamic_img_size", False)) or not getattr(patches, "strict_img_size", True)


def normalised(images: Tensor, config: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    """Return images as the model takes them, by timm's own operations in timm's own order.

    Args:
        images: uint8 `[images, channels, height, width]`.
        config: The model's evaluation transform (`data_config`); its `mean` and `std` are used.
        dtype: The model's own.
    """
    mean, std = (_of_channels(config[name], images.device) for name in ("mean", "std"))  # each [channels, 1, 1]
    return images.float().div(255).sub(mean).div(std).to(dtype)


def _of_channels(values: Sequence[float], device: torch.device) -> Tensor:
    """Return numbers of channels as float32 `[channels, 1, 1]`.

    They are filled in where they are needed: a copy to a GPU would wait until it has done all that it was given.
    """
    return torch.stack([torch.full((1, 1), value, dtype=torch.float32, device=device) for value in values])


def check_entries(config: Mapping[str, Any], whose: str) -> None:
    """Refuse entries of a configuration with which images would be prepared wrongly, or not at all.

    timm takes its own default for an entry of null and for a `crop_mode` that it does not have.

    Args:
        config: timm's entries `mean`, `std`, `interpolation`, ...; those that are missing are not checked.
        whose: Where they stand, for the message.

    Raises:
        UsageError: An entry is none of its choices.
    """
    for name, (valid, choices) in ENTRIES.items():
        if name in config and not (valid(config[name]) or (config[name] is None and name.startswith("test_"))):
            raise UsageError(f"{name} {whose} must be {choices}, got {config[name]!r}")


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(_is_number(number) for number in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_crop(value: Any) -> bool:
    return _is_number(value) and 0 < value <= 2


def _is_size(value: Any) -> bool:
    return _are_numbers(value) and len(value) == 3 and all(isinstance(number, int) and number > 0 for number in value)


ENTRIES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "mean": (_are_numbers, "a list of numbers, one for each channel"),
    "std": (
        lambda value: _are_numbers(value) and min(value) > 0,
        "a list of numbers above 0, one for each channel",
    ),
    "interpolation": (INTERPOLATIONS.__contains__, f"one of {', '.join(INTERPOLATIONS)}"),
    "crop_mode": (CROP_MODES.__contains__, f"one of {', '.join(CROP_MODES)}"),
    "crop_pct": (_is_crop, "a number above 0 and at most 2"),
    "test_crop_pct": (_is_crop, "a number above 0 and at most 2"),
    "input_size": (_is_size, "three whole numbers above 0, [CHANNELS, HEIGHT, WIDTH]"),
    "test_input_size": (_is_size, "three whole numbers above 0, [CHANNELS, HEIGHT, WIDTH]"),
}
"""For each entry of a configuration that the images depend on, what it must be, also in words."""


def size_decisions(backbone: nn.Module, train_size: bool) -> list[Decision]:
    """Return at which image size and crop a model is tested, if timm trains and tests it with different ones."""
    tested, trained = data_config(backbone), data_config(backbone, train_size=True)
    if tested == trained:
        return []
    used, other = (trained, tested) if train_size else (tested, trained)
    why = "as in training (--model.train_size true)" if train_size else "as timm tests it"
    remedy = "timm tests it at" if train_size else "--model.train_size true for that of training,"
    text = f"{_size_text(used)}, {why}; {remedy} {_size_text(other)}"
    return [Decision("image size", text, shown=True)]


def normalisation_decision(config: Mapping[str, Any], model: str) -> Decision:
    """Return how images are normalised: a file of weights does not say which normalisation they were trained with."""
    numbers = ", ".join(f"{name} {tuple(round(float(value), 4) for value in config[name])}" for name in ("mean", "std"))
    return Decision("normalisation", f"{numbers}, as {model} is configured (pretrained_cfg_overlay)")


def _size_text(config: Mapping[str, Any]) -> str:
    _, height, width = config["input_size"]
    return f"{height} x {width} pixels with crop_pct {config['crop_pct']:g}"


def check_channels(config: Mapping[str, Any], channels: int | None) -> None:
    """Refuse a model if `in_chans`, its images, its mean and its standard deviation differ in their channels.

    Args:
        config: The model's evaluation transform (`data_config`).
        channels: The option `in_chans`, None if it was not given.

    Raises:
        UsageError: They differ.
    """
    found = {} if channels is None else {"in_chans": channels}
    found |= {"input_size": config["input_size"][0], "mean": len(config["mean"]), "std": len(config["std"])}
    if len(set(found.values())) > 1:
        raise UsageError(
            "the model's options or its config.json give different numbers of channels; set input_size, mean and "
            f"std in model.options.pretrained_cfg_overlay to the channels of in_chans, got {found}"
        )


def sized(options: dict[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return options whose `pretrained_cfg_overlay` has the size and crop that they ask for, in tests too.

    Args:
        options: Arguments of `timm.create_model`; not every model keeps its `img_size` itself.
        config: timm's configuration of the model.
    """
    for name in (OVERLAY, "pretrained_cfg"):
        given = options.get(name)
        if isinstance(given, Mapping):
            check_entries(given, f"in model.options.{name}")
        elif given is not None and (name == OVERLAY or not isinstance(given, str)):
            raise UsageError(f"model.options.{name} must be entries of a configuration, got {given!r}")
    overlay = dict(options.get(OVERLAY) or {})
    size = options.get("img_size")
    if size is not None and "input_size" not in overlay:
        height, width = (size, size) if isinstance(size, int) else size
        channels = options.get("in_chans") or config.get("input_size", (3,))[0]
        overlay["input_size"] = (channels, height, width)
    for asked, tested in (("input_size", "test_input_size"), ("crop_pct", "test_crop_pct")):
        if asked in overlay:
            overlay.setdefault(tested, None)  # what was asked for is not overruled by timm's own for tests
    return {**options, OVERLAY: overlay} if overlay else dict(options)


def check_size(config: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Refuse an `input_size` in the overlay that a model built for another size does not follow."""
    asked = (options.get(OVERLAY) or {}).get("input_size")
    if asked and tuple(asked[1:]) != tuple(config["input_size"][1:]):
        height, width = config["input_size"][1:]
        raise UsageError(
            f"this model is built for images of {height} x {width} pixels; use model.options.img_size for another "
            f"size, got input_size {list(asked)} in model.options.{OVERLAY}"
        )
