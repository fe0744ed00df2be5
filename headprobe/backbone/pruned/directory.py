"""A pruned model on disk: `config.json` as timm reads it, `model.safetensors`, `README.md`; written and checked here.

Nothing in it can run code. The configuration holds the SHA-256 of the weights' file and of itself, so that a changed
byte, or a file of another model, is noticed before anything is computed.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import nn

from headprobe import __version__
from headprobe.backbone.pruned.card import card_text, refuse_other_shapes, steps_of
from headprobe.backbone.pruned.record import layers_to_json, record_of
from headprobe.errors import RunError, UsageError
from headprobe.files import partial_path, write_bytes, write_text
from headprobe.text import counted, first_line

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"

KEY = "headprobe"
"""Where the configuration of a pruned model holds what timm does not know of."""

SCHEMA = 1
"""Version of what stands there; an older reader of a newer one would build another model."""

OWN_ENTRIES = {"schema", "version", "layers", "weights_sha256", "config_sha256"}
"""Entries that are made here, whatever else is said of where a model comes from."""

OF_WEIGHTS_ELSEWHERE = ("file", "url", "hf_hub_id", "hf_hub_filename", "state_dict", "source", "custom_load")

NOT_KEPT = ("pretrained_cfg_overlay", "pretrained_cfg", "cache_dir", "num_classes")
"""Options that are in the configuration's other entries, or say where weights are."""


def save_directory(
    backbone: nn.Module,
    folder: Path,
    architecture: str,
    options: Mapping[str, Any],
    about: Mapping[str, Any],
    files: Mapping[str, str] | None = None,
) -> None:
    """Write a pruned model, whole or not at all.

    Args:
        backbone: The model.
        folder: Where to; it must not exist yet.
        architecture: timm's name of the architecture.
        options: The arguments of `timm.create_model` that it was built with.
        about: Where it comes from, as JSON values: `parent`, `mask`, `ablation`, ...
        files: Further text files, by name.

    Raises:
        UsageError: The folder exists, or an option is no JSON value.
        RunError: The files cannot be written.
    """
    refuse_existing(folder)
    about = _as_json(about)
    _refuse_names(about, files or {})
    refuse_other_shapes(about)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()}
    weights = save(tensors, metadata={"format": "pt"})
    own = {
        "schema": SCHEMA,
        "version": __version__,
        "layers": layers_to_json(record_of(backbone)),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        **about,
    }
    config = {**_timm_config(backbone, architecture, options), KEY: own}
    config[KEY]["config_sha256"] = digest_of(config)
    texts = {CONFIG: json.dumps(config, indent=1) + "\n", CARD: card_text(config), **(files or {})}
    partial = partial_path(folder)
    try:
        partial.mkdir(parents=True)
        write_bytes(partial / WEIGHTS, weights)
        for name, text in texts.items():
            write_text(partial / name, text)
        partial.rename(folder)
    except OSError as error:
        raise RunError(
            f"cannot write {str(folder)!r} ({error.strerror or error}); make room or choose another folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_existing(folder: Path) -> None:
    """Refuse a folder that is there already, as nothing is ever replaced, or that cannot be made.

    Raises:
        UsageError: It exists, its name is not one, or it lies where nothing can be written.
    """
    try:
        there = os.path.lexists(folder)  # a link to nowhere too
        folder.stat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise UsageError(f"the new folder cannot have this name ({first_line(error)}), got {str(folder)!r}") from error
    if there:
        raise UsageError(f"the new folder must not exist yet; remove it or choose another name, got {str(folder)!r}")
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not os.access(above, os.W_OK | os.X_OK):
        raise UsageError(
            f"the new folder's place {str(above)!r} cannot be written to; choose another, got {str(folder)!r}"
        )


def _refuse_names(about: Mapping[str, Any], files: Mapping[str, str]) -> None:
    """Refuse entries and files that would take the place of the folder's own, or lie outside of it."""
    if taken := sorted(OWN_ENTRIES & about.keys()):
        raise UsageError(f"about must leave {', '.join(sorted(OWN_ENTRIES))} to headprobe, got {taken[0]!r}")
    for name in files:
        if name in (CONFIG, WEIGHTS, CARD) or Path(name).name != name:
            raise UsageError(
                f"a further file must have a plain name, and none of {CONFIG}, {WEIGHTS}, {CARD}, got {name!r}"
            )


def _as_json(about: Mapping[str, Any]) -> dict[str, Any]:
    """Return entries as they are read again, so that their digest is the same."""
    try:
        found: dict[str, Any] = json.loads(json.dumps(dict(about)))
    except (TypeError, ValueError) as error:
        raise UsageError(f"about must be JSON values ({first_line(error)}), got {about!r}") from error
    return found


def _timm_config(backbone: nn.Module, architecture: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries that timm reads, for the model as it is now."""
    known: Any = backbone.pretrained_cfg
    config = {
        name: value for name, value in dict(known).items() if name not in OF_WEIGHTS_ELSEWHERE and value is not None
    }
    classes = int(backbone.num_classes)  # type: ignore[arg-type]  # timm: int
    config |= {"architecture": architecture, "num_classes": classes, "label_offset": 0}
    arguments = {name: value for name, value in options.items() if name not in NOT_KEPT}
    try:
        text = json.dumps({"architecture": architecture, "num_classes": classes, "model_args": arguments,
                           "pretrained_cfg": config})  # fmt: skip
    except TypeError as error:
        raise UsageError(f"a model can be saved if its options are JSON values ({error}), got {arguments}") from error
    found: dict[str, Any] = json.loads(text)
    return found


def digest_of(config: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a configuration, but for the entry that holds it."""
    own = {name: value for name, value in config[KEY].items() if name != "config_sha256"}
    text = json.dumps({**config, KEY: own}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


# -- what is read ------------------------------------------------------------------------------------------------------


def checked_config(config: Mapping[str, Any], file: Path) -> Mapping[str, Any] | None:
    """Return what a `config.json` says of a pruned model; None where it is not one.

    Raises:
        UsageError: A newer headprobe wrote it, or it was changed since.
    """
    own = config.get(KEY)
    if own is None:
        return None
    schema = own.get("schema") if isinstance(own, Mapping) else None
    if schema != SCHEMA:
        raise UsageError(
            f"the pruned model in {str(file.parent)!r} has schema {schema!r}, and this headprobe reads {SCHEMA}: a "
            "newer release wrote it, so update headprobe (python -m pip install --upgrade headprobe), got "
            f"{str(file)!r}"
        )
    if own.get("config_sha256") != digest_of(config):
        raise UsageError(
            f"{CONFIG} of the pruned model was changed after it was written, and it says which heads are left: restore "
            f"it or prune again, got {str(file)!r}"
        )
    return dict(own)


def refuse_other_weights(own: Mapping[str, Any], file: Path) -> None:
    """Refuse a file of weights that was not written with the configuration beside it.

    Raises:
        UsageError: It is another file.
    """
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != own.get("weights_sha256"):
        raise UsageError(
            f"{file.name} is not the file that was written with the {CONFIG} beside it: it was changed, or belongs to "
            "another model; restore it, or give other weights of the same shapes with --model.weights, got "
            f"{str(file)!r}"
        )


def in_words(own: Mapping[str, Any]) -> str:
    """Return what a pruned model's configuration says of it, for those who measure it."""
    layers = own["layers"].values()
    before, left = sum(one["heads"] for one in layers), sum(len(one["kept"]) for one in layers)
    text = f"{counted(before - left, 'head')} of {before} removed in {counted(len(layers), 'layer')} before"
    steps = steps_of(own)
    masks = [f"{step['mask']['spec']}, {step.get('ablation', 'zero')}" for step in steps if "mask" in step]
    if masks:
        text += f" ({', then '.join(masks)})"
    text += "; layers and heads are numbered anew"
    fits = [step["calibration"] for step in steps if step.get("calibration")]
    fitted = [f"{counted(fit.get('images', 0), 'image')} of {fit.get('data', 'its data')}" for fit in fits]
    if fitted:
        text += f"; fitted on {' and '.join(fitted)}, which do not judge it fairly"
    trained = own.get("fine_tuned", {}).get("mask_spec")
    if trained:
        text += f"; trained under the mask {trained}, whose heads write nothing (headprobe prune removes them)"
    return text
