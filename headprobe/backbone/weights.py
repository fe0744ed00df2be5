"""Creates timm models: pretrained, from a local safetensors file, or bundled with headprobe."""

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from headprobe.errors import RunError, UsageError
from headprobe.text import first_line

BUNDLED = ("digits_vit", "digits_swin")
"""Models that ship with headprobe, trained on scikit-learn's digits by its own `fit`."""


@dataclass(frozen=True)
class ModelSource:
    """What to build and where its weights come from.

    Attributes:
        name: timm's name of the architecture, or a bundled model's.
        weights: A local safetensors file; None means timm's pretrained weights (or the bundled ones).
        pretrained: False starts from random weights.
        num_classes: None keeps the weights' own number of classes.
        options: More arguments of `timm.create_model`, such as `img_size` or `pretrained_cfg_overlay`.
    """

    name: str
    weights: str | None = None
    pretrained: bool = True
    num_classes: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def create_backbone(source: ModelSource) -> nn.Module:
    """Build a timm model in evaluation mode with its weights loaded.

    Raises:
        UsageError: The name, the weights or the options do not fit together; the message names the remedy.
        RunError: Pretrained weights cannot be fetched.
    """
    source = _resolved(source)
    if not timm.is_model(source.name):
        near = difflib.get_close_matches(source.name, [*BUNDLED, *timm.list_models()], n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; timm.list_models() lists the names"
        raise UsageError(f"timm {timm.__version__} has no model called {source.name!r}{hint}")

    options = dict(source.options)
    if options.get("features_only"):
        raise UsageError("features_only builds a model without a classifier, which cannot be scored; remove the option")
    if "checkpoint_path" in options:
        raise UsageError(
            "model.options.checkpoint_path is not read; give the weights as safetensors, by --model.weights"
        )

    if source.weights is not None:
        state = read_safetensors(source.weights)
        options = built_options(source)
        options.setdefault("num_classes", source.num_classes or _classes_in(state, source.name))
        backbone = _create(source.name, pretrained=False, options=options)
        _load(backbone, state, source.name, source.weights)
    else:
        if source.num_classes is not None:
            options["num_classes"] = source.num_classes
        backbone = _create(source.name, pretrained=source.pretrained, options=options)
    return backbone.eval()


def built_options(source: ModelSource) -> dict[str, Any]:
    """Return the options that a model is built with: the options in its weights' file, overridden by the user's."""
    source = _resolved(source)
    return _merged(_recipe_options(source), source.options) if source.weights is not None else dict(source.options)


def data_config(backbone: nn.Module) -> dict[str, Any]:
    """Return timm's evaluation transform of a model: `input_size`, `mean`, `std`, `interpolation`, `crop_pct`, ...

    The image size is the one that the model was built for, even where an option changed it.
    """
    config: dict[str, Any] = dict(resolve_model_data_config(backbone))
    built_for = image_sides(getattr(backbone, "patch_embed", None), "img_size", config["input_size"][0])
    if built_for is not None:
        config["input_size"] = (config["input_size"][0], *built_for)
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


def normalised(images: Tensor, config: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    """Return images as the model takes them, by timm's own operations in timm's own order.

    Args:
        images: uint8 `[images, channels, height, width]`.
        config: The model's evaluation transform (`data_config`); its `mean` and `std` are used.
        dtype: The model's own.
    """
    mean = torch.tensor(config["mean"], device=images.device).view(-1, 1, 1)  # [channels, 1, 1]
    std = torch.tensor(config["std"], device=images.device).view(-1, 1, 1)
    return images.float().div(255).sub(mean).div(std).to(dtype)


class Classifier(NamedTuple):
    """A model that can be scored.

    Attributes:
        backbone: The timm model, in evaluation mode.
        data_config: Its evaluation transform, as `data_config` returns it.
        num_classes: Classes of its classifier.
    """

    backbone: nn.Module
    data_config: dict[str, Any]
    num_classes: int


def create_classifier(source: ModelSource) -> Classifier:
    """Build a model as `create_backbone` does, and refuse one that cannot be scored.

    Raises:
        UsageError: The model cannot be built, has no classifier, or takes an unclear number of channels.
        RunError: Pretrained weights cannot be fetched.
    """
    backbone = create_backbone(source)
    config = data_config(backbone)
    num_classes = int(backbone.num_classes)  # type: ignore[arg-type]  # timm: int
    if num_classes < 1:
        raise UsageError(f"model {source.name!r} has no classifier to score; give model.num_classes and model.weights")
    _check_channels(config, source.options.get("in_chans"))
    return Classifier(backbone, config, num_classes)


def _check_channels(config: Mapping[str, Any], channels: int | None) -> None:
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
            "the model's options give different numbers of channels; set input_size, mean and std in "
            f"model.options.pretrained_cfg_overlay to the channels of in_chans, got {found}"
        )


def weights_digest(module: nn.Module) -> str:
    """Return the SHA-256 of all parameters and persistent buffers, names, types and shapes included."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # raw bytes: numpy has no bfloat16
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_backbone(backbone: nn.Module, path: Path, source: ModelSource) -> None:
    """Write weights as safetensors; the file's metadata holds the recipe to build the model again."""
    source = _resolved(source)
    recipe = {"name": source.name, "num_classes": source.num_classes, "options": dict(source.options)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()}
    save_file(tensors, path, metadata={"headprobe": json.dumps(recipe, sort_keys=True)})


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Read a safetensors file and no other: opening other formats can run code.

    Raises:
        UsageError: No such file, or it is not safetensors.
    """
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"weights file {str(path)!r} does not exist; give the path of a .safetensors file")
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"weights file {str(path)!r} is not readable as safetensors ({error}); "
            "convert other formats with safetensors.torch.save_file"
        ) from error


def _recipe_options(source: ModelSource) -> dict[str, Any]:
    """Return the options in a file that `save_backbone` wrote; any other file has none."""
    with safe_open(source.weights, framework="pt") as opened:
        recipe = json.loads((opened.metadata() or {}).get("headprobe", "null"))
    if recipe is None:
        return {}
    if recipe["name"] != source.name:
        raise UsageError(
            f"the weights in {source.weights!r} were trained as {recipe['name']!r}; "
            f"give --model.name {recipe['name']}, got {source.name!r}"
        )
    options: dict[str, Any] = recipe["options"]
    return options


def _resolved(source: ModelSource) -> ModelSource:
    """Return a bundled model's source with timm's name, its options and its weights; any other source as it is."""
    if source.name not in BUNDLED:
        return source
    file = resources.files("headprobe").joinpath("data", "digits", f"{source.name}.safetensors")
    with resources.as_file(file) as path:
        with safe_open(path, framework="pt") as opened:
            recipe = json.loads(opened.metadata()["headprobe"])
        weights = source.weights or (str(path) if source.pretrained else None)
        classes = source.num_classes or (None if weights else recipe["num_classes"])
        return ModelSource(recipe["name"], weights, False, classes, _merged(recipe["options"], source.options))


def _merged(options: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return options overridden by the user's; the entries of `pretrained_cfg_overlay` are overridden one by one."""
    overlay = "pretrained_cfg_overlay"
    both = {**options, **own}
    if overlay in options and overlay in own:
        both[overlay] = {**options[overlay], **own[overlay]}
    return both


def _create(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    """Build a model with timm; wrong options and weights that cannot be fetched give one message."""
    try:
        backbone: nn.Module = timm.create_model(name, pretrained=pretrained, **_sized(name, options))
    except (TypeError, ValueError, AssertionError, RuntimeError, KeyError) as error:
        what = f"with the options {options}" if options else "with its default options"
        raise UsageError(f"timm cannot build {name!r} {what}: {error or type(error).__name__}") from error
    except OSError as error:  # every failure of a hub's client
        raise RunError(
            f"the pretrained weights of {name!r} cannot be fetched ({first_line(error)}); "
            "check the connection, or pass a local file: --model.weights FILE.safetensors"
        ) from error
    return backbone


def _sized(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return options with `img_size` in their `pretrained_cfg_overlay` too: not every model keeps the size itself."""
    overlay = dict(options.get("pretrained_cfg_overlay") or {})
    size = options.get("img_size")
    if size is None or "input_size" in overlay:
        return options
    height, width = (size, size) if isinstance(size, int) else size
    channels = options.get("in_chans") or timm.get_pretrained_cfg(name).input_size[0]
    return {**options, "pretrained_cfg_overlay": {**overlay, "input_size": (channels, height, width)}}


def _classes_in(state: dict[str, Tensor], name: str) -> int:
    """Return the number of classes in a state dict; timm's configuration holds the classifier's name."""
    classifiers = getattr(timm.get_pretrained_cfg(name), "classifier", None) or "head"
    first = classifiers if isinstance(classifiers, str) else classifiers[0]
    weight = state.get(f"{first}.weight")
    if weight is None:
        raise UsageError(
            f"the weights have no classifier {first + '.weight'!r} as {name!r} has; they belong to another model, "
            "or were saved without a classifier"
        )
    return int(weight.shape[0])


def _load(backbone: nn.Module, state: dict[str, Tensor], name: str, path: str) -> None:
    """Load a state dict strictly; one message names what does not fit."""
    own = backbone.state_dict()
    missing = [key for key in own if key not in state]
    extra = [key for key in state if key not in own]
    shapes = [key for key in own if key in state and own[key].shape != state[key].shape]
    parts = []
    for what, keys in (("missing", missing), ("unknown", extra), ("of another shape", shapes)):
        if keys:
            parts.append(f"{len(keys)} {what} (first: {keys[0]})")
    if parts:
        raise UsageError(
            f"the weights in {path!r} are not those of {name!r}: of {len(own)} tensors {', '.join(parts)}; "
            "give the name they were saved from with --model.name, and its options with --model.options"
        )
    backbone.load_state_dict(state, strict=True)
