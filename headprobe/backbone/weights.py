"""Creates timm models: pretrained, from the hub, from local safetensors, or bundled with headprobe."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from headprobe.backbone.outputs import class_names, embedding_in_words, embeds, no_classifier
from headprobe.backbone.own_weights import build_filtered, changes, refuse_weights
from headprobe.backbone.places import PLACES, Place, located, near_name, unbuildable, unreadable
from headprobe.backbone.preparation import (
    OVERLAY,
    check_channels,
    check_entries,
    check_size,
    data_config,
    size_decisions,
    sized,
)
from headprobe.backbone.pretrained import with_pretrained
from headprobe.errors import RunError, UsageError
from headprobe.text import Decision, counted, first_line

BUNDLED = ("digits_vit", "digits_swin")
"""Models that ship with headprobe, trained on scikit-learn's digits by its own `fit`."""

ABOUT_IMAGES = ("img_size", "in_chans", OVERLAY, "pretrained_cfg", "cache_dir")
"""Options that leave what the weights mean as it is; what they change is said elsewhere."""

WEIGHTS_ENTRIES = ("file", "url", "hf_hub_id", "hf_hub_filename", "state_dict", "source", "custom_load")
"""Entries of a configuration that say where weights come from, or how they are loaded."""


@dataclass(frozen=True)
class ModelSource:
    """What to build and where its weights come from.

    Attributes:
        name: timm's name of the architecture, a bundled model's, `hf-hub:OWNER/MODEL` or `local-dir:FOLDER`.
        weights: A local safetensors file; None means timm's pretrained weights (or those that the name brings).
        pretrained: False starts from random weights.
        num_classes: None keeps the weights' own number of classes.
        options: More arguments of `timm.create_model`, such as `img_size` or `pretrained_cfg_overlay`.
        train_size: Prepare images as in training where timm tests the model at another size.
    """

    name: str
    weights: str | None = None
    pretrained: bool = True
    num_classes: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    train_size: bool = False

    @property
    def random(self) -> bool:
        """Whether nothing is loaded, so that all weights are random."""
        return self.weights is None and not self.pretrained


def create_backbone(source: ModelSource) -> nn.Module:
    """Build a timm model in evaluation mode with its weights loaded.

    Raises:
        UsageError: The name, the weights or the options do not fit together; the message names the remedy.
        RunError: Pretrained weights cannot be fetched.
    """
    return _build(source, trained=False).backbone


class Built(NamedTuple):
    """A model in evaluation mode, the options that it was built with, and what was decided about its weights."""

    backbone: nn.Module
    options: dict[str, Any]
    decisions: list[Decision]


def _build(source: ModelSource, *, trained: bool) -> Built:
    """Build a model.

    Args:
        source: What to build.
        trained: Refuse a model with parameters that no weights were loaded for, unless all are meant to be random.
    """
    resolved = _resolved(source)
    _check_options(resolved)
    place = _place_of(source)
    if source.random:
        name = resolved.name if place is None else place.name
        options = sized(_asked(resolved), _config_of(resolved, place))
        backbone = _shaped(_created(name, False, options, resolved), place)
        decisions = [Decision("weights", "random, never trained (--model.pretrained false)", shown=True)]
    elif resolved.weights is not None:
        backbone, decisions = _with_own_weights(resolved, place, resolved.weights)
    elif place is not None:
        backbone, decisions = _with_own_weights(resolved, place, str(place.weights))
    else:
        config, asked = _config_of(resolved, None), _asked(resolved)
        create = partial(_created, resolved.name, True, source=resolved)
        backbone, decisions = with_pretrained(
            create, resolved.name, sized(asked, config), config, asked, trained=trained
        )
    decisions += _overridden(source, place)
    if place is not None and place.commit:
        decisions.append(Decision("model", f"{source.name} at commit {place.commit}"))
    if place is not None and place.pruned is not None:
        from headprobe.backbone.pruned.directory import in_words

        decisions.append(Decision("pruned", in_words(place.pruned), shown=True))
    # those in a place's config.json too: not all of them show in the weights
    options = {**(place.arguments if place is not None else {}), **built_options(source)}
    return Built(backbone.eval(), options, decisions)


def _overridden(source: ModelSource, place: Place | None) -> list[Decision]:
    """Return which options differ from those that the weights were made with: other heads fit them in shape too."""
    if source.random or not source.options:
        return []
    resolved = _resolved(source)
    if resolved.weights is None and place is None:
        given = [f"{name} {value}" for name, value in source.options.items() if name not in ABOUT_IMAGES]
        if not given:
            return []
        text = f"{', '.join(given)}, given beside the released weights, which were trained without (--model.options)"
        return [Decision("options", text, shown=True)]
    if source.name in BUNDLED or (resolved.weights is not None and _recipe(resolved.weights) is not None):
        whose, own = "the weights' own recipe", built_options(replace(source, options={}))
    elif place is not None:
        whose, own = "its config.json", dict(place.arguments)
    else:
        return []
    pairs = [(name, value, own.get(name)) for name, value in source.options.items() if name != OVERLAY]
    entries = own.get(OVERLAY) or {}
    given_entries = source.options.get(OVERLAY) or {}
    pairs += [(name, value, entries[name]) for name, value in given_entries.items() if name in entries]
    texts = [
        f"{name} {value} where {whose} has {'none' if before is None else before}"
        for name, value, before in pairs
        if json.dumps(value, default=str) != json.dumps(before, default=str)
    ]
    return [Decision("options", ", ".join(texts), shown=True)] if texts else []


def _check_options(source: ModelSource) -> None:
    """Refuse options that headprobe cannot honour, and names that timm does not have."""
    if not source.name.lower().startswith(PLACES) and not timm.is_model(source.name):
        raise UsageError(
            f"timm {timm.__version__} has no model called {source.name!r}; {near_name(source.name, BUNDLED)}"
        )
    if source.options.get("features_only"):
        raise UsageError("features_only builds a model without a classifier, which cannot be scored; remove the option")
    _refuse_other_weights(source.options)


def _refuse_other_weights(options: Mapping[str, Any]) -> None:
    """Refuse options by which timm would load other weights than those that decisions and run.json name."""
    found = ["checkpoint_path"] if "checkpoint_path" in options else []
    for name in (OVERLAY, "pretrained_cfg"):
        given = options.get(name)
        entries = given if isinstance(given, Mapping) else vars(given) if hasattr(given, "__dict__") else {}
        found += [f"{name}.{entry}" for entry in WEIGHTS_ENTRIES if entries.get(entry)]
    if "pretrained" in options:
        raise UsageError(
            f"model.options.pretrained is not read; give --model.pretrained {str(options['pretrained']).lower()}"
        )
    if found:
        raise UsageError(f"model.options.{found[0]} is not read; give the weights as safetensors, by --model.weights")


def _place_of(source: ModelSource) -> Place | None:
    """Return where a model lies that is not in timm's own table; its weights are fetched only where they are used."""
    if not source.name.lower().startswith(PLACES):
        return None
    place = located(source.name, weights=source.pretrained and source.weights is None)
    check_entries(place.config, f"of the config.json of {source.name!r}")
    return place


def _config_of(source: ModelSource, place: Place | None) -> Mapping[str, Any]:
    """Return timm's configuration of a name: number of classes, name of the classifier, image size, ..."""
    if place is not None:
        return place.config
    tag = source.options.get("pretrained_cfg")
    name = f"{source.name.partition('.')[0]}.{tag}" if isinstance(tag, str) else source.name
    config = timm.get_pretrained_cfg(name)
    return config.to_dict() if config is not None else {}


def _with_own_weights(source: ModelSource, place: Place | None, path: str) -> tuple[nn.Module, list[Decision]]:
    """Build a model with the weights of a safetensors file, which must fit: as they are, or through timm's filter."""
    if place is not None and place.pruned is not None and source.weights is None:
        from headprobe.backbone.pruned.directory import refuse_other_weights

        refuse_other_weights(place.pruned, Path(path))
    state = read_safetensors(path)
    config = _config_of(source, place)
    name = source.name if place is None else place.name
    options = sized(_asked(source), config)
    classifier = config.get("classifier") or "head"
    head = classifier if isinstance(classifier, str) else classifier[0]
    classes = classes_in(state, head)
    written = config.get("num_classes") if place is not None and source.weights is None else None
    if classes and written and written != classes and "num_classes" not in options:
        raise UsageError(
            f"the config.json of {source.name!r} has num_classes {written}, and the classifier in {path!r} has "
            f"{counted(classes, 'class')}; correct the config.json, or give num_classes {classes} "
            "(--model.num_classes) where the weights are right"
        )
    left_out = []
    if options.get("num_classes") == 0 and classes is not None:
        state = {name: tensor for name, tensor in state.items() if not name.startswith(f"{head}.")}
        text = f"{head}, of {counted(classes, 'class')}: the model is built without one (--model.num_classes 0)"
        left_out = [Decision("classifier left out", text, shown=True)]
    if classes is not None:
        options.setdefault("num_classes", classes)
    backbone = _shaped(_created(name, False, options, source), place)
    read = Path(path).name if source.weights is not None else f"the safetensors of {source.name}"
    decisions = [Decision("weights", read), *left_out]
    if masked := mask_of_weights(source):
        text = f"trained under the mask {masked}, whose heads write nothing (headprobe prune removes them)"
        decisions.append(Decision("masked heads", text, shown=True))
    own = backbone.state_dict()
    decisions += _types(state, own, path)
    if own.keys() == state.keys() and all(own[key].shape == state[key].shape for key in own):
        backbone.load_state_dict(state, strict=True)
        return backbone, decisions
    # the filter knows the shapes of timm's own models only
    pruned = place is not None and place.pruned is not None
    filtered = None if pruned else build_filtered(name, options, config, state)
    if filtered is None:
        refuse_weights(state, own, source.name, path, head)
    made_to_fit = f"timm's filter of checkpoints {changes(state, filtered)}"
    return filtered, [*decisions, Decision("weights made to fit", made_to_fit, shown=True)]


def _types(state: Mapping[str, Tensor], own: Mapping[str, Tensor], path: str) -> list[Decision]:
    """Return which types of floating point are read as the model's own; refuse whole numbers in their place."""
    whole = [
        name
        for name, tensor in state.items()
        if not tensor.is_floating_point()
        and (own[name].is_floating_point() if name in own else name.endswith((".weight", ".bias")))
    ]
    if whole:
        raise UsageError(
            f"the weights in {path!r} are whole numbers, perhaps quantised, where the model has floating point; give "
            f"the weights before they were quantised, got {whole[0]} as {_type_text(state[whole[0]])}"
        )
    others = Counter(
        (_type_text(state[name]), _type_text(tensor))
        for name, tensor in own.items()
        if name in state and state[name].dtype != tensor.dtype and tensor.is_floating_point()
    )
    if not others:
        return []
    texts = [f"{counted(times, 'tensor')} of {read} as {kept}" for (read, kept), times in others.items()]
    return [Decision("types of weights", f"read {', '.join(texts)}")]


def _type_text(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def classes_in(state: Mapping[str, Tensor], head: str) -> int | None:
    """Return the number of classes in weights: the rows of the classifier, under timm's name or a usual one."""
    usual = [key for key in state if key.rpartition(".")[0].rpartition(".")[2] in ("head", "fc", "classifier")]
    for key in (f"{head}.weight", *reversed(usual)):
        if key in state and key.endswith(".weight") and state[key].dim() >= 2:
            return len(state[key])
    return None


def _asked(source: ModelSource) -> dict[str, Any]:
    """Return the arguments of `timm.create_model` that a user gave, in the file of the weights or beside it."""
    number = {} if source.num_classes is None else {"num_classes": source.num_classes}
    return {**built_options(source), **number}


def built_options(source: ModelSource) -> dict[str, Any]:
    """Return the options that a model is built with: the options in its weights' file, overridden by the user's."""
    source = _resolved(source)
    return _merged(_recipe_options(source), source.options) if source.weights is not None else dict(source.options)


class Classifier(NamedTuple):
    """A model that can be scored.

    Attributes:
        backbone: The timm model, in evaluation mode.
        data_config: Its evaluation transform, as `data_config` returns it.
        num_classes: Classes of its classifier, 0 without one.
        options: Arguments of `timm.create_model` that it was built with.
        class_names: Their names, in the classifier's order, where the weights' configuration has them.
        decisions: What was decided about its weights and images.
    """

    backbone: nn.Module
    data_config: dict[str, Any]
    num_classes: int
    options: dict[str, Any]
    class_names: list[str] | None
    decisions: list[Decision]


def create_classifier(source: ModelSource, *, trained: bool = True, own: bool = True) -> Classifier:
    """Build a model as `create_backbone` does, and refuse one that cannot be scored.

    Args:
        source: What to build.
        own: Its own classifier scores it, so it must have one.
        trained: Refuse a model with parameters that its weights do not have, a new classifier above all; a model whose
            weights are all meant to be random is not refused.

    Raises:
        UsageError: The model cannot be built, has no classifier, has an untrained part, or takes an unclear number of
            channels.
        RunError: Pretrained weights cannot be fetched.
    """
    backbone, options, decisions = _build(source, trained=trained)
    config = data_config(backbone, source.train_size)
    num_classes = int(backbone.num_classes)  # type: ignore[arg-type]  # timm: int
    embedding = embeds(backbone, own_weights=source.weights is not None)
    if own and (num_classes < 1 or (embedding and trained)):
        raise no_classifier(source.name, num_classes if embedding else 0)
    if embedding:
        decisions.append(Decision("embedding", embedding_in_words(num_classes), shown=True))
    check_channels(config, source.options.get("in_chans"))
    check_size(config, source.options)
    decisions += size_decisions(backbone, source.train_size)
    if not own and (embedding or num_classes < 1):
        return Classifier(backbone, config, 0, options, None, decisions)
    names, about_names = class_names(backbone, num_classes)
    return Classifier(backbone, config, num_classes, options, names, decisions + about_names)


def weights_digest(module: nn.Module) -> str:
    """Return the SHA-256 of all parameters and persistent buffers, names, types and shapes included."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # raw bytes: numpy has no bfloat16
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_backbone(backbone: nn.Module, path: Path, source: ModelSource, mask_spec: str | None = None) -> None:
    """Write weights as safetensors; the file's metadata holds the recipe to build the model again.

    Args:
        backbone: The model.
        path: The file.
        source: What was built.
        mask_spec: The heads under whose mask it was trained, which write nothing in these weights.
    """
    source = _resolved(source)
    recipe = {"name": source.name, "num_classes": source.num_classes, "options": dict(source.options)}
    if mask_spec is not None:
        recipe["mask_spec"] = mask_spec
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()}
    save_file(tensors, path, metadata={"headprobe": json.dumps(recipe, sort_keys=True)})


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Read a safetensors file and no other: opening other formats can run code.

    Raises:
        UsageError: No such file, or it is not safetensors.
    """
    file = Path(path)
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise unreadable(file, error) from error


def pruned_source(source: ModelSource) -> Mapping[str, Any] | None:
    """Return what the configuration of a pruned model says of it; None for the source of any other model."""
    place = _place_of(replace(source, pretrained=False))
    return None if place is None else place.pruned


def mask_of_weights(source: ModelSource) -> str | None:
    """Return the mask spec under which weights were trained, in a file or a pruned model's folder; None for others."""
    if source.random:
        return None
    if source.weights is None:
        pruned = pruned_source(source)
        written = None if pruned is None else pruned.get("fine_tuned")
    else:
        written = _recipe(source.weights)
    found: str | None = None if written is None else written.get("mask_spec")
    return found


def _recipe_options(source: ModelSource) -> dict[str, Any]:
    """Return the options in a file that `save_backbone` wrote; any other file has none."""
    recipe = _recipe(source.weights)
    if recipe is None:
        return {}
    if recipe["name"] != source.name:
        raise UsageError(
            f"the weights in {source.weights!r} were trained as {recipe['name']!r}; "
            f"give --model.name {recipe['name']}, got {source.name!r}"
        )
    options: dict[str, Any] = recipe["options"]
    _refuse_other_weights(options)
    return options


def _recipe(weights: str | None) -> dict[str, Any] | None:
    with safe_open(weights, framework="pt") as opened:
        recipe: dict[str, Any] | None = json.loads((opened.metadata() or {}).get("headprobe", "null"))
    return recipe


def _resolved(source: ModelSource) -> ModelSource:
    """Return a bundled model's source with timm's name, its options and its weights; any other source as it is."""
    if source.name not in BUNDLED:
        return source
    file = resources.files("headprobe").joinpath("data", "digits", f"{source.name}.safetensors")
    with resources.as_file(file) as path:
        recipe = _recipe(str(path)) or {}
        weights = source.weights or (str(path) if source.pretrained else None)
        classes = source.num_classes
        if classes is None and not weights:
            classes = recipe["num_classes"]
        options = _merged(recipe["options"], source.options)
        return ModelSource(recipe["name"], weights, False, classes, options, source.train_size)


def _merged(options: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return options overridden by the user's; the entries of `pretrained_cfg_overlay` are overridden one by one."""
    both = {**options, **own}
    if OVERLAY in options and OVERLAY in own:
        both[OVERLAY] = {**options[OVERLAY], **own[OVERLAY]}
    return both


def _created(name: str, pretrained: bool, options: dict[str, Any], source: ModelSource) -> nn.Module:
    """Build a model with timm; wrong options and weights that cannot be fetched give one message."""
    try:
        backbone: nn.Module = timm.create_model(name, pretrained=pretrained, **options)
    except (TypeError, ValueError, AssertionError, RuntimeError, KeyError) as error:
        raise unbuildable(source.name, _asked(source), error) from error
    except OSError as error:  # every failure of a hub's client
        raise RunError(
            f"the pretrained weights of {source.name!r} cannot be fetched ({first_line(error)}); "
            "check the connection, or pass a local file: --model.weights FILE.safetensors"
        ) from error
    return backbone


def _shaped(backbone: nn.Module, place: Place | None) -> nn.Module:
    """Return a new model with as many heads as the configuration of a pruned model says; any other as it is."""
    if place is None or place.pruned is None:
        return backbone
    from headprobe.backbone.pruned.record import layers_from_json, with_fewer_heads  # here: few models are pruned

    where = str(place.folder / "config.json")
    return with_fewer_heads(backbone, layers_from_json(place.pruned.get("layers"), where), where)
