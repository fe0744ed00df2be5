"""Pruned models in Python: made of a model in hand, saved, and loaded as PyTorch modules with timm's interface."""

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from headprobe.api import one_variant
from headprobe.backbone.built_size import built_size, inner_model, timm_config
from headprobe.backbone.pruned.directory import save_directory
from headprobe.backbone.pruned.record import record_of
from headprobe.backbone.sandbox import copied, evaluating, example_images, quiet
from headprobe.backbone.weights import ModelSource, create_backbone, weights_digest
from headprobe.calibration.constants import Calibration
from headprobe.errors import RunError, UsageError
from headprobe.masks.ablations import ZERO
from headprobe.masks.spec import MaskSpec
from headprobe.pruning.remove import prove_same, without_heads


def remove_heads(
    model: nn.Module,
    spec: str | MaskSpec,
    *,
    input_size: tuple[int, int, int] | None = None,
    ablation: str = ZERO,
    calibration: str | Path | Calibration | None = None,
) -> nn.Module:
    """Return a smaller copy of a timm model, without some heads, that computes what `ablate` makes the model compute.

    Both are compared on noise in float32; a difference above 1e-5 of the largest logit is an error. Hooks of your own
    stay with the model in hand: the copy has none.

    Args:
        model: A timm model, on any device.
        spec: A mask spec that stands for one mask.
        input_size: `(channels, height, width)` of your images; without it the size the model was built for.
        ablation: What stands for the heads: `zero`, `mean`, `optimal` or `linear`.
        calibration: A run's folder or `calibration.safetensors` with the constants of these.

    Raises:
        UsageError: The spec does not fit the model or stands for several masks, heads cannot be removed, or the
            ablation cannot be folded into weights; or the calibration is not one of this model and its weights.
        RunError: The smaller model is not the masked one.
    """
    chosen = one_variant(model, spec, input_size, "slot", ablation, calibration)
    keep = chosen.variant.mask.mask.keep()
    if not chosen.variant.mask.mask.count:
        raise UsageError(f"a mask must hit heads that are to be removed, got {spec}")
    with torch.inference_mode(False), quiet(model):
        smaller = without_heads(model, chosen.layout, keep, chosen.fill)
        prove_same(smaller, model, chosen.layout, keep, chosen.fill)
    return smaller


def save_pruned(
    model: nn.Module,
    folder: str | Path,
    options: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None,
    files: Mapping[str, str] | None = None,
) -> None:
    """Write a pruned model for `load_pruned` and `local-dir:`, and read it back to be sure that it is the same.

    Args:
        model: What `remove_heads` returned, perhaps trained since.
        folder: Where to; it must not exist yet.
        options: The arguments of `timm.create_model` that its model was built with, but for the name.
        about: Where it comes from, as JSON values for its `config.json`; `parent`, `mask`, `ablation`, `calibration`,
            `proof`, `cost` and `fine_tuned` as `headprobe prune` writes them, which the model card reads.
        files: Further text files, by name.

    Raises:
        UsageError: The folder exists, an option is no JSON value, `about` says something in another shape, or the model
            has all of its heads.
        RunError: The files cannot be written, or what is read back is not the model; nothing is left then.
    """
    if inner_model(model) is not model:
        raise UsageError(
            "save_pruned takes the model inside of wrappers for several devices: give model.module to remove_heads, "
            f"got a {type(model).__name__}"
        )
    if not record_of(model):
        raise UsageError(
            f"save_pruned takes a model that remove_heads returned, got a {type(model).__name__} with all of its heads"
        )
    target, architecture = Path(folder), timm_config(model).get("architecture")
    save_directory(model, target, str(architecture), options or {}, about or {}, files)
    with ExitStack() as undo:
        undo.callback(shutil.rmtree, target, ignore_errors=True)  # whatever happens: what was not checked is no model
        _refuse_other(model, target)
        undo.pop_all()


def _refuse_other(model: nn.Module, folder: Path) -> None:
    """Read a folder back and refuse one that is not the model that was written."""
    there, here = load_pruned(folder), copied(model, str(folder)).cpu()
    here.to(next(there.parameters()).dtype)  # loaded in float32, from a file in the model's own type
    size = built_size(model)
    same = built_size(there) == size
    if same:
        images = example_images(there, size, 2, seed=4)
        with evaluating(there), evaluating(here), torch.inference_mode():
            same = torch.equal(there(images), here(images))
    if not same or weights_digest(there) != weights_digest(here):
        raise RunError(
            "the pruned model that was written is not the one that was made: was it built with other options, or "
            f"changed in ways that its config.json does not hold? nothing is left of it, got {str(folder)!r}"
        )


def load_pruned(folder: str | Path) -> nn.Module:
    """Load a model that `headprobe prune` or `save_pruned` wrote, in evaluation mode, on the CPU.

    It is the class that timm builds, with `forward_features`, `forward_head`, `default_cfg` and `get_classifier`, and
    it can be exported (`torch.export`, ONNX).

    Args:
        folder: With `config.json` and `model.safetensors`.

    Raises:
        UsageError: It is no such folder; a file was changed, or is of another model; or a newer headprobe wrote it.
    """
    backbone = create_backbone(ModelSource(f"local-dir:{folder}"))
    if not record_of(backbone):
        raise UsageError(
            "load_pruned takes a folder that headprobe prune wrote; a model with all of its heads is loaded by "
            f"timm.create_model('local-dir:{folder}'), got {str(folder)!r}"
        )
    return backbone
