"""From a model with one mask to a folder with the smaller model: removed, proven, measured, written, read back."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from headprobe.backbone.masking.replacement import Replacement
from headprobe.backbone.weights import pruned_source
from headprobe.calibration.constants import digest_of
from headprobe.calibration.fills import replacements_of
from headprobe.errors import UsageError
from headprobe.masks.ablations import FITTED
from headprobe.masks.spec import Variant
from headprobe.module import HeadProbe
from headprobe.pruning.cost import Cost, Latency, cost_lines, measured
from headprobe.pruning.load import save_pruned
from headprobe.pruning.remove import IMAGES_OF_NOISE, TOLERANCE, prove_same, refuse_unfoldable, without_heads
from headprobe.text import counted

HISTORY = ("parent", "mask", "ablation", "calibration", "fine_tuned")
"""What a model that is pruned again keeps of its parent's `config.json`."""


@dataclass(frozen=True)
class Pruning:
    """One model, the mask that is to become permanent, and what is put in its place.

    Attributes:
        probe: The whole model; its calibration holds the constants.
        variant: The mask and the kind of ablation.
        images: `[images, channels, height, width]` uint8, real ones that the proof also holds on; None without data.
        pairs: Pairs of timings that measure latency.
        about: Further entries of `config.json`, as JSON values.
        files: Further text files, by name.
    """

    probe: HeadProbe
    variant: Variant
    images: Tensor | None = None
    pairs: int = 20
    about: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def keep(self) -> Tensor:
        """`[layers, max heads]` bool, True = keep."""
        return self.variant.mask.mask.keep()

    @property
    def fill(self) -> Replacement:
        """What fills the masked slots."""
        return replacements_of([self.variant], self.probe.layout, self.probe.calibration)[0]

    def smaller(self) -> nn.Module:
        """Return the model without the heads."""
        return without_heads(self.probe.backbone, self.probe.layout, self.keep, self.fill)


def refuse_hopeless(probe: HeadProbe, variant: Variant) -> None:
    """Refuse a mask that no smaller model can come of, before anything is fitted.

    Raises:
        UsageError: With the reason.
    """
    hit = {layer for layer, _ in variant.mask.mask.masked}
    if not hit:
        raise UsageError(f"a mask must hit heads that are to be removed, got {variant.mask.name}")
    refuse_unfoldable(probe.backbone, [probe.layout.layers[number] for number in sorted(hit)], variant.ablation)


def make(pruning: Pruning, folder: Path, speed: float | None = None) -> tuple[list[str], dict[str, Any]]:
    """Write the smaller model.

    Args:
        pruning: The model, the mask and what is put in its place.
        folder: Where to.
        speed: How many times faster the largest batch was to be, as an earlier measurement had it.

    Returns:
        What is to be said of it, line by line; and what its `config.json` says of it, as JSON values.

    Raises:
        UsageError: The folder exists, or heads cannot be removed.
        RunError: The smaller model is not the masked one, or cannot be written; nothing is left then.
    """
    probe, whole = pruning.probe, pruning.probe.backbone
    smaller = pruning.smaller()
    proof = _proof(pruning, smaller)
    cost = measured(whole, smaller, probe.layout.input_size, pruning.pairs)

    own = {**_about(pruning), "proof": proof, "cost": cost.to_json(), **pruning.about}
    save_pruned(smaller, folder, probe.identity()["options"], own, pruning.files)
    return [*_lines(pruning, proof, cost, folder), *_of_speed(cost.latencies[-1], speed)], own


def _of_speed(measured_again: Latency, wanted: float | None) -> list[str]:
    """Return a line where the chosen model, measured anew, is not as fast as when it was chosen."""
    if wanted is None or measured_again.speed >= wanted:
        return []
    return [
        f"note: {wanted:g}x was wanted and measured when the set was chosen; measured again it is "
        f"{measured_again.speed:.2f}x at batch {measured_again.batch}: within the noise of this machine; more --pairs "
        "help, or ask for more with --speed"
    ]


def _proof(pruning: Pruning, smaller: nn.Module) -> dict[str, Any]:
    """Return on how many images the logits are those of the masked model, and how nearly.

    Raises:
        RunError: They are not.
    """
    probe = pruning.probe
    on = [None] if pruning.images is None else [None, probe.normalised(pruning.images.to(probe.device))]
    differences = [
        prove_same(smaller, probe.backbone, probe.layout, pruning.keep, pruning.fill, images) for images in on
    ]
    real = 0 if pruning.images is None else len(pruning.images)
    return {
        "difference": max(differences),
        "tolerance": TOLERANCE,
        "images": IMAGES_OF_NOISE + real,
        "real_images": real,
    }


def _about(pruning: Pruning) -> dict[str, Any]:
    """Return where a smaller model comes from, as JSON values."""
    probe, mask = pruning.probe, pruning.variant.mask
    identity = probe.identity()
    found: dict[str, Any] = {
        "parent": {name: identity[name] for name in ("name", "weights_sha256")},
        "mask": {
            "spec": mask.name,
            "digest": mask.mask.digest,
            "layers": identity["layers"],
            "heads_per_layer": identity["heads_per_layer"],
            **mask.mask.to_json(),
        },
        "ablation": pruning.variant.ablation,
        "calibration": None,
    }
    before = pruned_source(probe.source)
    if before is not None:
        # what the parent's own folder says, and with it what its parent's said
        found["parent"]["pruned"] = {name: before[name] for name in HISTORY if name in before}
    if probe.calibration is not None and pruning.variant.ablation in FITTED:
        about = probe.calibration.about
        found["calibration"] = {
            "sha256": digest_of(probe.calibration),
            "images": about.get("images"),
            "data": about.get("data", {}).get("path", "unknown data"),
            "split": about.get("data", {}).get("split"),
            "refitted": bool(about.get("refitted")),
        }
    return found


def _lines(pruning: Pruning, proof: Mapping[str, Any], cost: Cost, folder: Path) -> list[str]:
    probe, mask = pruning.probe, pruning.variant.mask
    gone, heads = mask.mask.count, sum(probe.layout.heads_per_layer)
    empty = [number for number, kept in enumerate(pruning.keep.tolist()) if not any(_own(probe, number, kept))]
    without = f"; {counted(len(empty), 'layer')} without heads, a bias each" if empty else ""
    title = (
        f"{probe.title} without {gone} of {counted(heads, 'head')} ({mask.name}, {pruning.variant.ablation}){without}"
    )
    images = f"{proof['images'] - proof['real_images']} images of noise"
    if proof["real_images"]:
        images += f" and {proof['real_images']} real ones"
    return [
        title,
        *cost_lines(cost),
        f"proof: logits are the masked model's to {proof['difference']:.1e} of the largest, on {images} in float32 "
        f"(limit {proof['tolerance']:.0e})",
        f"wrote {folder}: model.safetensors, config.json, README.md" + "".join(f", {name}" for name in pruning.files),
        _use(probe, folder, heads_left=heads - gone),
    ]


def _use(probe: HeadProbe, folder: Path, heads_left: int) -> str:
    """Return how a smaller model is used, to be copied into a shell or into Python: judged as the whole one was."""
    in_python = f"headprobe.load_pruned({str(folder)!r})"
    if not heads_left:
        return f"use it: {in_python}; headprobe test masks heads, and it has none"
    judge = "" if probe.classifier is None else f" --model.classifier {shlex.quote(probe.classifier)}"
    return f"use it: headprobe test --model.name {shlex.quote(f'local-dir:{folder}')}{judge} ..., or {in_python}"


def _own(probe: HeadProbe, number: int, kept: Sequence[bool]) -> Sequence[bool]:
    return kept[: probe.layout.heads_per_layer[number]]
