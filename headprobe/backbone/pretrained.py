"""timm's pretrained weights: builds a model with them, and refuses parts of it that they do not have."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import timm
import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from headprobe.errors import UsageError
from headprobe.text import Decision, counted

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

    def note(*given: Any) -> None:
        # module, state, prefix, metadata, strict, and the three lists
        record.missing, record.unexpected, record.errors = given[-3:]
        record.seen = True

    def hook(_: nn.Module, __: str, child: nn.Module | None) -> None:
        if child is not None:
            handles.append(child.register_load_state_dict_pre_hook(note))  # type: ignore[no-untyped-call]

    handles.append(register_module_module_registration_hook(hook))
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def with_pretrained(
    create: Callable[[dict[str, Any]], nn.Module],
    name: str,
    options: dict[str, Any],
    config: Mapping[str, Any],
    asked: Mapping[str, Any],
    *,
    trained: bool,
) -> tuple[nn.Module, list[Decision]]:
    """Build a model of timm's table with its pretrained weights.

    Args:
        create: Builds it with its weights, from the options of `timm.create_model`.
        name: timm's name of it.
        options: These options.
        config: timm's configuration of the weights.
        asked: Those of the options that the user gave.
        trained: Refuse a model with parameters that the weights do not have.

    Returns:
        The model, and what was decided about its weights.

    Raises:
        UsageError: timm cannot build it so, the weights do not fit, or a part of the model is not in them.
        RunError: The weights cannot be fetched.
    """
    with watched_loads() as record:
        try:
            backbone = create(for_native_stem(options, config))
        except UsageError as error:
            changed = [] if record.seen else _changed_by(name, options)
            _refuse_misfit(name, record, asked, error, changed)
    describe_images(backbone, options)
    tag = config.get("tag")
    released = f"those that timm releases as {name.partition('.')[0]}{f'.{tag}' if tag else ''}"
    decisions = [Decision("weights", released)]
    channels, native = options.get("in_chans"), config.get("input_size", (3,))[0]
    if channels not in (None, native):
        stem = f"timm made weights for {channels} channels from those for {native} (model.options.in_chans)"
        decisions.append(Decision("first layer", stem, shown=True))

    fresh = untrained(backbone, record) if trained else []
    built: Any = backbone.pretrained_cfg
    size = (channels or built["input_size"][0], *built["input_size"][1:])
    if fresh and _matter(backbone.eval(), fresh, size):
        _refuse_untrained(name, fresh, int(config.get("num_classes", 0)), asked)
    return backbone, decisions


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


def describe_images(backbone: nn.Module, options: Mapping[str, Any]) -> None:
    """Put what a user says of the images into a model's configuration again, after `for_native_stem`."""
    overlay = options.get("pretrained_cfg_overlay") or {}
    config: Any = backbone.pretrained_cfg
    config.update({key: value for key, value in overlay.items() if value is not None})


def _changed_by(name: str, options: Mapping[str, Any]) -> list[str]:
    """Return the tensors that options add to a model, take away or give another shape."""
    try:
        plain = timm.create_model(name).state_dict()
        changed = timm.create_model(name, **options).state_dict()
    except (TypeError, ValueError, AssertionError, RuntimeError, KeyError):
        return []
    other = [key for key in changed if key not in plain or plain[key].shape != changed[key].shape]
    return [*other, *(key for key in plain if key not in changed)]


def untrained(backbone: nn.Module, record: LoadRecord) -> list[str]:
    """Return the parameters that no weights were loaded for, and running statistics of norms among them."""
    learnt = {name for name, _ in backbone.named_parameters()}
    learnt |= {name for name, _ in backbone.named_buffers() if name.endswith(("running_mean", "running_var"))}
    return [name for name in record.missing if name in learnt] if record.seen else sorted(learnt)


def _matter(backbone: nn.Module, names: Sequence[str], size: Sequence[int]) -> bool:
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


def _refuse_untrained(name: str, fresh: Sequence[str], classes: int, options: Mapping[str, Any]) -> NoReturn:
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
            f"the pretrained weights of {name!r} lack {counted(len(fresh), 'tensor')} of the model, which would stay "
            f"random ({some(fresh)}); remove the options that add them, or {remedy}, got {dict(options)}"
        )
    have = f"{classes:,} classes" if classes else "no classifier"
    keep = ", or keep their classes and map the dataset's to them (--data.class_map)" if classes else ""
    raise UsageError(
        f"the pretrained weights of {name!r} have {have}, and timm would start a new, random classifier "
        f"({some(fresh)}); {remedy}{keep}, got num_classes {asked}"
    )


def _refuse_misfit(
    name: str, record: LoadRecord, options: Mapping[str, Any], error: UsageError, changed: Sequence[str]
) -> NoReturn:
    """Refuse options that pretrained weights do not fit; any other error is raised as it is.

    Args:
        name: The model's name.
        record: What was loaded.
        options: What the user asked for.
        error: What timm's failure was turned into.
        changed: Tensors that the options add, remove or give another shape; they are named where nothing was loaded.

    Raises:
        UsageError: Always.
    """
    parts = []
    if record.missing:
        parts.append(f"they lack {some(record.missing)}")
    if record.unexpected:
        parts.append(f"the model lacks {some(record.unexpected)}")
    parts += [text.strip() for text in record.errors if "size mismatch" in text][:1]
    if not parts and changed and options:
        parts.append(f"they change {some(changed)}")
    if not parts:
        raise error
    raise UsageError(
        f"the pretrained weights of {name!r} do not fit the model that these options make: {'; '.join(parts)}; remove "
        f"the options, or give weights of such a model with --model.weights, got {dict(options)}"
    ) from error


def some(names: Sequence[str]) -> str:
    """Return the first few of some names, and how many there are beside them."""
    others = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + others
