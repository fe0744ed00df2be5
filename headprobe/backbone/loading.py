"""How timm loads weights into a model: which parameters it filled, what its filter changed, and what does not fit."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from headprobe.backbone.checkpoints import wrapper_of
from headprobe.errors import UsageError
from headprobe.text import counted

NAMED = 3
"""So many names of parameters stand in a message; the others are counted."""


@dataclass
class LoadRecord:
    """What `load_state_dict` reported while timm built a model.

    Attributes:
        missing: Names of the model that the weights do not have.
        unexpected: Names of the weights that the model does not have.
        errors: PyTorch's messages about tensors of another shape.
        seen: Whether anything was loaded.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    seen: bool = False


@contextmanager
def watched_loads() -> Iterator[LoadRecord]:
    """Watch what is loaded into models that are built inside; timm itself only logs it.

    Every sub-module gets a hook as it is registered. The lists that PyTorch hands to these hooks are those of the whole
    model and fill up until the load ends. All hooks are removed in the end.
    """
    record = LoadRecord()
    handles: list[Any] = []

    def note(
        module: nn.Module,
        state: Any,
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        record.missing, record.unexpected, record.errors, record.seen = missing, unexpected, errors, True

    def hook(module: nn.Module, name: str, child: nn.Module | None) -> None:
        if child is not None:
            handles.append(child.register_load_state_dict_pre_hook(note))

    handles.append(register_module_module_registration_hook(hook))
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def build_filtered(name: str, options: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module | None:
    """Build a model and load own weights through timm's filter of checkpoints for that architecture.

    The filter resamples position embeddings and tables of relative positions to the model's size and renames the tensors
    of official releases. timm applies it only inside `create_model`, which takes weights as a part of the configuration.

    Args:
        name: As `timm.create_model` takes it.
        options: Its further arguments.
        state: The weights.

    Returns:
        The model, or None where even so the weights do not fit it exactly.
    """
    overlay = {
        **(options.get("pretrained_cfg_overlay") or {}),
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
                name, pretrained=True, **{**options, "pretrained_cfg_overlay": overlay}
            )
        # A filter may stumble in any way over weights that are not the architecture's.
        except (RuntimeError, ValueError, TypeError, AssertionError, LookupError, AttributeError):
            return None
    config: Any = backbone.pretrained_cfg
    config.pop("state_dict", None)
    return backbone if record.seen and not record.unexpected and not untrained(backbone, record) else None


def for_native_stem(options: dict[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with which timm can adapt the first layer of pretrained weights to `in_chans`.

    timm takes the channels of the weights from `input_size`, where a user's overlay holds those of the images.

    Args:
        options: Arguments of `timm.create_model`.
        config: timm's configuration of the weights.
    """
    overlay = options.get("pretrained_cfg_overlay") or {}
    size, native = overlay.get("input_size"), config.get("input_size", (3,))[0]
    if not size or size[0] == native:
        return options
    overlay = {**overlay, "input_size": (native, *size[1:])}
    return {**options, "in_chans": options.get("in_chans", size[0]), "pretrained_cfg_overlay": overlay}


def untrained(backbone: nn.Module, record: LoadRecord) -> list[str]:
    """Return the parameters that no weights were loaded for, and running statistics of norms among them."""
    learnt = {name for name, _ in backbone.named_parameters()}
    learnt |= {name for name, _ in backbone.named_buffers() if name.endswith(("running_mean", "running_var"))}
    return [name for name in record.missing if name in learnt] if record.seen else sorted(learnt)


def matter(backbone: nn.Module, names: Sequence[str], size: Sequence[int]) -> bool:
    """Return whether parameters change a model's output: with NaN in them, is any of it NaN?

    Parameters that do not are set to zero, so that a model's digest does not change with the seed.

    Args:
        backbone: The model, in evaluation mode.
        names: Names of parameters and buffers.
        size: `[channels, height, width]` of an image.
    """
    state = backbone.state_dict()
    with torch.no_grad():
        for name in names:
            state[name].fill_(torch.nan)
        poisoned = bool(backbone(torch.zeros(1, *size)).isnan().any())
        for name in names:
            state[name].zero_()
    return poisoned


def refuse_untrained(name: str, fresh: Sequence[str], classes: int, options: Mapping[str, Any]) -> NoReturn:
    """Refuse a model with parameters that were never trained.

    Args:
        name: The model's name.
        fresh: Its parameters that no weights were loaded for.
        classes: Number of classes of the pretrained weights.
        options: What the user asked for.

    Raises:
        UsageError: Always.
    """
    remedy = "score a fine-tuned model (--model.weights FILE.safetensors)"
    asked = options.get("num_classes", classes)
    if asked == classes:
        raise UsageError(
            f"the pretrained weights of {name!r} lack {counted(len(fresh), 'tensor')} of the model, which would stay random "
            f"({_some(fresh)}); remove the options that add them, or {remedy}, got {dict(options)}"
        )
    have = f"{classes:,} classes" if classes else "no classifier"
    keep = ", or keep their classes and map the dataset's to them (--data.class_map)" if classes else ""
    raise UsageError(
        f"the pretrained weights of {name!r} have {have}, and timm would start a new, random classifier "
        f"({_some(fresh)}); {remedy}{keep}, got num_classes {asked}"
    )


def refuse_misfit(name: str, record: LoadRecord, options: Mapping[str, Any], error: UsageError) -> NoReturn:
    """Refuse options that pretrained weights do not fit; any other error is raised as it is.

    Args:
        name: The model's name.
        record: What was loaded.
        options: What the user asked for.
        error: What timm's failure was turned into.

    Raises:
        UsageError: Always.
    """
    parts = []
    if record.missing:
        parts.append(f"they lack {_some(record.missing)}")
    if record.unexpected:
        parts.append(f"the model lacks {_some(record.unexpected)}")
    parts += [text.strip() for text in record.errors[:1]]
    if not parts:
        raise error
    raise UsageError(
        f"the pretrained weights of {name!r} do not fit the model that these options make: {'; '.join(parts)}; remove the "
        f"options, or give weights of such a model with --model.weights, got {dict(options)}"
    ) from error


def changes(state: Mapping[str, Tensor], backbone: nn.Module) -> str:
    """Return in words what timm's filter changed between own weights and the model that they were loaded into."""
    own = backbone.state_dict()
    shaped = [name for name in own if name in state and own[name].shape != state[name].shape]
    strange = [name for name in state if name not in own]
    words = []
    if shaped:
        first = shaped[0]
        sizes = f"from {list(state[first].shape)} to {list(own[first].shape)}"
        others = f" and {counted(len(shaped) - 1, 'other tensor')}" if len(shaped) > 1 else ""
        words.append(f"resampled {first} {sizes}{others}")
    if strange:
        words.append(
            f"renamed or left out {counted(len(strange), 'tensor')} that timm names otherwise ({_some(strange)})"
        )
    return " and ".join(words) or "changed values"


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
    wrapper = wrapper_of(state)
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
            f"or were saved without a classifier (their first tensor is {next(iter(state), 'none')})"
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
        f"the weights in {path!r} are not those of {name!r}: of {len(own)} tensors {', '.join(parts)}; timm's filter of "
        "checkpoints cannot make them fit either; give the name they were saved from with --model.name, and its options "
        "with --model.options"
    )


def _some(names: Sequence[str]) -> str:
    others = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + others
