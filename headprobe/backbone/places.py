"""timm's names for models that lie elsewhere: `hf-hub:OWNER/MODEL[@REVISION]` and `local-dir:FOLDER`.

Both hold a `config.json` (architecture, options, preprocessing, names of classes) and weights. Only safetensors are
read, and no code of a repository is run: timm builds an architecture of its own from the configuration.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from headprobe.backbone.checkpoints import cut_short
from headprobe.errors import RunError, UsageError
from headprobe.text import first_line

HUB, FOLDER = "hf-hub", "local-dir"
PLACES = ("hf-hub:", "hf_hub:", "local-dir:")
"""How names of models outside timm's own table begin; the second is timm's older form of the first."""

WEIGHTS = "model.safetensors"
PICKLES = (".bin", ".pth", ".pt", ".tar", ".ckpt")
"""Suffixes of formats that can run code when they are opened."""


@dataclass(frozen=True)
class Place:
    """A model outside timm's own table.

    Attributes:
        name: As timm builds it: `local-dir:` and a folder, that of the hub's cache for a model of the hub.
        architecture: timm's name of its architecture.
        config: timm's configuration of its weights: classes, image size, mean, standard deviation, ...
        arguments: The arguments of `timm.create_model` that it was built with.
        folder: Where its files lie.
        weights: Its safetensors file; None if no weights were asked for.
        commit: The commit of a model of the hub.
        pruned: What its configuration says of heads that headprobe removed; None for a model as timm builds it.
    """

    name: str
    architecture: str
    config: Mapping[str, Any]
    arguments: Mapping[str, Any]
    folder: Path
    weights: Path | None = None
    commit: str | None = None
    pruned: Mapping[str, Any] | None = None


def located(name: str, *, weights: bool) -> Place:
    """Find a model by its name.

    Args:
        name: `hf-hub:OWNER/MODEL[@REVISION]` or `local-dir:FOLDER`.
        weights: Find its weights too, and fetch them from the hub.

    Raises:
        UsageError: There is no such place, it holds no model of timm's, or no weights as safetensors.
        RunError: The hub cannot be reached and its cache does not have the files.
    """
    source, where = _split(name)
    if not where:
        raise UsageError(f"a model's name must go on after {source}: with a model or folder, got {name!r}")
    return _on_hub(name, where, weights) if source == HUB else _in_folder(name, Path(where).expanduser(), weights)


def unreadable(file: Path, error: Exception) -> UsageError:
    """Return the error for a file of weights that is not safetensors, with what to do about it."""
    if file.is_dir():
        found = sorted(file.glob("*.safetensors"))
        inside = f", or one file in it: --model.weights {found[0]}" if found else ""
        return UsageError(
            f"weights must be one safetensors file, and {str(file)!r} is a folder; a model that timm saved there is "
            f"--model.name local-dir:{file}{inside}"
        )
    if not file.exists():
        return UsageError(f"weights file {str(file)!r} does not exist; give the path of a .safetensors file")
    if cut_short(file):
        return UsageError(f"weights file {str(file)!r} is incomplete: copy or download it again")
    return UsageError(
        f"weights file {str(file)!r} is not readable as safetensors ({first_line(error)}); a checkpoint of PyTorch's "
        f"can be converted without running its code: headprobe convert {file} OUT.safetensors"
    )


def unbuildable(name: str, options: Mapping[str, Any], error: Exception) -> UsageError:
    """Return the error for a model that timm cannot build with the options that a user gave."""
    what = f"with the options {dict(options)}" if options else "with its default options"
    hint = ""
    if "img_size" in options and "unexpected keyword argument 'img_size'" in str(error):
        hint = "; it takes images of any size: give pretrained_cfg_overlay: {input_size: [3, HEIGHT, WIDTH]} instead"
    return UsageError(f"timm cannot build {name!r} {what}: {first_line(error)}{hint}")


def near_name(name: str, bundled: Sequence[str]) -> str:
    """Return the hint to a name that timm does not have: the nearest ones, or how models elsewhere are named."""
    if Path(name).expanduser().is_dir():
        return f"for a model in a folder give local-dir:{name}"
    if "/" in name:
        return f"for a model of the hub give hf-hub:{name.removeprefix('https://huggingface.co/')}"
    near = difflib.get_close_matches(name, [*bundled, *timm.list_models()], n=3)
    return f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists the names"


def _split(name: str) -> tuple[str, str]:
    source, _, where = name.partition(":")
    return source.lower().replace("_", "-"), where


def _in_folder(name: str, folder: Path, weights: bool) -> Place:
    if not folder.is_dir():
        raise UsageError(f"there is no folder {str(folder)!r}; give one that timm's save_for_hf wrote, got {name!r}")
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"the folder {str(folder)!r} has no config.json as timm's save_for_hf writes it; give the architecture "
            f"with --model.name and a file with --model.weights, got {name!r}"
        )
    place = _read(name, folder)
    return replace(place, weights=_weights_in(folder)) if weights else place


def _weights_in(folder: Path) -> Path:
    """Return a folder's safetensors file.

    Raises:
        UsageError: It has none, or several.
    """
    found = sorted(folder.glob("*.safetensors"))
    if folder / WEIGHTS in found:
        return folder / WEIGHTS
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(file.name for file in found[:3])
        raise UsageError(
            f"the folder {str(folder)!r} has {len(found)} safetensors files ({names}, ...) and none is called "
            f"{WEIGHTS}; choose one with --model.weights"
        )
    pickles = sorted(file for file in folder.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise UsageError(
            f"the folder {str(folder)!r} has its weights as a pickle, which could run code and is never opened in a "
            f"run; convert it first: headprobe convert {pickles[0]} {folder / WEIGHTS}"
        )
    raise UsageError(f"the folder {str(folder)!r} has no weights; {WEIGHTS} must lie in it, or give --model.weights")


def _on_hub(name: str, where: str, weights: bool) -> Place:
    repository, _, revision = where.partition("@")
    if not all(repository.partition("/")):
        raise UsageError(
            f"a model of the hub needs its owner: hf-hub:OWNER/MODEL or hf-hub:OWNER/MODEL@REVISION, got {name!r}"
        )
    config = _fetched(name, repository, "config.json", revision or None)
    commit = config.parent.name
    place = replace(_read(name, config.parent), commit=commit)
    # At the same commit: the branch may have moved on between two requests.
    return replace(place, weights=_fetched(name, repository, WEIGHTS, commit)) if weights else place


def _fetched(name: str, repository: str, file: str, revision: str | None) -> Path:
    """Return a file of the hub in its cache, fetched if need be."""
    try:
        return Path(hf_hub_download(repository, file, revision=revision, library_name="headprobe"))
    except LocalEntryNotFoundError as error:
        raise RunError(
            f"the hub cannot be reached for {name!r}, and its cache has no {file} of it ({first_line(error)}); check "
            "the connection, or pass local files: --model.name local-dir:FOLDER"
        ) from error
    except EntryNotFoundError as error:
        if file == WEIGHTS:
            raise UsageError(
                f"the model {name!r} has no {WEIGHTS}; a pickle such as pytorch_model.bin could run code and is "
                "never opened in a run: download it, convert it (headprobe convert pytorch_model.bin OUT.safetensors), "
                "and give it with --model.weights beside the same --model.name"
            ) from error
        raise UsageError(f"the repository of {name!r} has no {file}, so it is no model that timm can build") from error
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError, GatedRepoError) as error:
        raise UsageError(
            f"the hub has no such model, revision, or access to it ({first_line(error)}); the form is "
            f"hf-hub:OWNER/MODEL or hf-hub:OWNER/MODEL@REVISION, and private models need a login, got {name!r}"
        ) from error
    except OSError as error:
        raise RunError(
            f"{file} of {name!r} cannot be fetched ({first_line(error)}); check the connection, or pass local files: "
            "--model.name local-dir:FOLDER"
        ) from error


def _read(name: str, folder: Path) -> Place:
    """Read the configuration in a folder, in either of the two forms that timm reads."""
    file = folder / "config.json"
    try:
        written = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{str(file)!r} is not readable as JSON ({first_line(error)})") from error
    pruned = _pruned(written, file) if isinstance(written, dict) else None
    architecture = written.get("architecture") if isinstance(written, dict) else None
    if not isinstance(architecture, str):
        raise UsageError(
            f"the config.json of {name!r} names no architecture of timm's, {_whose(written)}; only models that timm's "
            "save_for_hf or push_to_hf_hub wrote can be built from it"
        )
    if not timm.is_model(architecture):
        raise UsageError(f"timm {timm.__version__} has no model called {architecture!r}, which {name!r} names")
    arguments, inner = written.get("model_args", {}), written.get("pretrained_cfg")
    if not isinstance(arguments, dict):
        raise UsageError(f"model_args of the config.json of {name!r} must be a dictionary, got {arguments!r}")
    # timm's older form has the configuration at the top, and no arguments
    if not isinstance(inner, dict) and ("pretrained_cfg" in written or "model_args" in written):
        raise UsageError(
            f"pretrained_cfg of the config.json of {name!r} must be a dictionary with mean, std, ..., as timm's "
            f"save_for_hf writes it, got {inner!r}"
        )
    config = {**(written.get("pretrained_cfg") or written)}
    for key in ("num_classes", "label_names"):
        if key in written:
            config[key] = written[key]
    return Place(f"{FOLDER}:{folder}", architecture, config, arguments, folder, pruned=pruned)


def _pruned(written: Mapping[str, Any], file: Path) -> Mapping[str, Any] | None:
    """Return what the configuration of a pruned model says of its heads; None for any other model."""
    if "headprobe" not in written:
        return None
    from headprobe.backbone.pruned.directory import checked_config  # here: few models are pruned

    return checked_config(written, file)


def _whose(written: Any) -> str:
    kind = written.get("model_type") if isinstance(written, dict) else None
    return f"but a {kind!r} of the transformers library" if kind else "as timm's own do"
