"""Own weights that do not fit a model as they are: through timm's filter of checkpoints, or refused."""

from collections.abc import Mapping
from typing import Any, NoReturn

import timm
from torch import Tensor, nn

from headprobe.backbone.checkpoints import inside_of, wrapper_of
from headprobe.backbone.pretrained import describe_images, for_native_stem, some, untrained, watched_loads
from headprobe.errors import UsageError
from headprobe.text import counted

PLACED = ("pos", "relative", "patch_embed", "rope", "attention_bias")
"""Parts of names of tensors that depend on the image size or patch size, which timm resamples."""


def build_filtered(
    name: str, options: dict[str, Any], config: Mapping[str, Any], state: Mapping[str, Tensor]
) -> nn.Module | None:
    """Build a model and load own weights through timm's filter of checkpoints for that architecture.

    The filter resamples position embeddings and tables of relative positions to the model's size and renames the
    tensors of official releases. timm applies it only inside `create_model`, which takes weights as a part of the
    configuration.

    Args:
        name: As `timm.create_model` takes it.
        options: Its further arguments.
        config: timm's configuration of the model.
        state: The weights.

    Returns:
        The model, or None where even so the weights do not fit it exactly.
    """
    fitted = for_native_stem(options, config)
    overlay = {
        **(fitted.get("pretrained_cfg_overlay") or {}),
        "state_dict": dict(state),
        "source": "",
        "custom_load": False,
        "label_offset": 0,
    }
    if "num_classes" in options:
        overlay["num_classes"] = options["num_classes"]  # timm drops the classifier where the two differ
    with watched_loads() as record:
        try:
            backbone: nn.Module = timm.create_model(
                name, pretrained=True, **{**fitted, "pretrained_cfg_overlay": overlay}
            )
        # A filter may stumble in any way over weights that are not the architecture's.
        except (RuntimeError, ValueError, TypeError, AssertionError, LookupError, AttributeError):
            return None
    built: Any = backbone.pretrained_cfg
    del built["state_dict"]
    describe_images(backbone, options)
    return backbone if record.seen and not record.unexpected and not untrained(backbone, record) else None


def changes(state: Mapping[str, Tensor], backbone: nn.Module) -> str:
    """Return in words what timm's filter changed between own weights and the model that they were loaded into."""
    own = backbone.state_dict()
    shaped = [name for name in own if name in state and own[name].shape != state[name].shape]
    resampled = [name for name in shaped if any(word in name for word in PLACED)]
    strange = [name for name in state if name not in own]
    words = []
    if resampled:
        first = resampled[0]
        sizes = f"from {list(state[first].shape)} to {list(own[first].shape)}"
        others = f" and {counted(len(resampled) - 1, 'other tensor')}" if len(resampled) > 1 else ""
        words.append(f"resampled {first} {sizes}{others}")
    if strange:
        words.append(
            f"renamed or left out {counted(len(strange), 'tensor')} with names of another release ({some(strange)})"
        )
    if not words:
        words.append(f"reshaped {some(shaped)}")
    return " and ".join(words)


def refuse_weights(state: Mapping[str, Tensor], own: Mapping[str, Tensor], name: str, path: str, head: str) -> NoReturn:
    """Refuse weights that do not fit a model, even through timm's filter; say what does not fit and what to do.

    Args:
        state: The weights.
        own: The model's own state.
        name: The model's name.
        path: The file of the weights.
        head: Name of the model's classifier.

    Raises:
        UsageError: Always.
    """
    wrapper = wrapper_of(state) or inside_of(state)
    if wrapper:
        raise UsageError(
            f"names of the weights in {path!r} have {wrapper!r} from a wrapper, which {name!r} has not; remove it: "
            f"headprobe convert {path} OUT.safetensors"
        )
    weight = f"{head}.weight"
    if weight in state and weight in own and len(state[weight]) != len(own[weight]):
        raise UsageError(
            f"the classifier in {path!r} has {len(state[weight]):,} classes; leave the number of classes out, or give "
            f"fine-tuned weights, got num_classes {len(own[weight])}"
        )
    if weight in own and weight not in state:
        raise UsageError(
            f"the weights in {path!r} have no classifier {weight!r} as {name!r} has; they belong to another model, "
            f"or were saved without a classifier, which --model.num_classes 0 and --model.classifier are for "
            f"(their first tensor is {next(iter(state), 'none')})"
        )
    parts = []
    for what, keys in (
        ("missing", [key for key in own if key not in state]),
        ("unknown", [key for key in state if key not in own]),
        ("of another shape", [key for key in own if key in state and own[key].shape != state[key].shape]),
    ):
        if keys:
            parts.append(f"{len(keys)} {what} (first: {keys[0]})")
    raise UsageError(
        f"the weights in {path!r} are not those of {name!r}: of {len(own)} tensors {', '.join(parts)}; timm's filter "
        "of checkpoints cannot make them fit either; give the name they were saved from with --model.name, and its "
        "options with --model.options"
    )
