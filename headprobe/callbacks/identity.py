"""The identity of a run, as plain data: all that changes its numbers; and the key, which is its digest."""

import hashlib
import inspect
import json
import linecache
import os
import platform
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
import torch
from timm.layers import use_fused_attn

from headprobe import __version__
from headprobe.backbone.proofs.kept import KeptProofs, modules_digest
from headprobe.calibration.constants import digest_of
from headprobe.describe.base import HeadStatistic
from headprobe.files import shown, source_digest
from headprobe.module import HeadProbe, data_of
from headprobe.run.orders import order_decisions
from headprobe.text import Decision, safe_command, without_secrets

PACKAGES = ("torch", "torchvision", "timm", "lightning", "torchmetrics", "datasets", "pillow", "numpy")
"""Packages that can change a number."""


def identify(trainer: lightning.Trainer, probe: HeadProbe) -> dict[str, Any]:
    """Return the identity of a test: all that changes its numbers, known before its first image.

    The row plan follows from the variants, the batch size and the row budget.

    Args:
        trainer: Runs the test.
        probe: The model with its masks.
    """
    if probe.calibrating:
        return _of_calibration(trainer, probe)
    scored = ["paired_accuracy"]
    if probe.per_class:
        scored.append("per_class")
    # Where a callback keeps records, a unit is not finished without them.
    if any(getattr(callback, "keeps_records", False) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        scored.append("records")
    data = data_of(trainer)
    return {
        "model": probe.identity(),
        "data": data.identity(),
        # A list: the sums have the variants' order.
        "variants": [[one.mask.name, one.mask.mask.digest, one.ablation, one.draw] for one in probe.variants],
        "ablation": probe.ablations.text,
        "calibration": None if probe.calibration is None else digest_of(probe.calibration),
        "statistics": [*scored, *(statistic.options() for statistic in statistics_of(trainer))],
        **_arithmetic_of(trainer, probe),
    }


def _of_calibration(trainer: lightning.Trainer, probe: HeadProbe) -> dict[str, Any]:
    """Return the identity of a calibration: the same for all masks and ablations that need the same constants.

    Each round of a search for optimal constants has its own, and each after which heads are scored anew.
    """
    return {
        "model": probe.stage.model_identity(),
        "data": data_of(trainer).identity(),
        "variants": [],
        **probe.stage.identity(),
        "statistics": [statistic.options() for statistic in probe.statistics],
        **_arithmetic_of(trainer, probe),
    }


def _arithmetic_of(trainer: lightning.Trainer, probe: HeadProbe) -> dict[str, Any]:
    """Return what decides how numbers are rounded."""
    return {
        "precision": str(trainer.precision),
        "arithmetic": arithmetic(),
        "device": trainer.strategy.root_device.type,
        "batch_size": data_of(trainer).batch_size,
        "row_budget": probe.row_budget or "usual",
        "versions": versions(),
    }


def kept_proofs(trainer: lightning.Trainer, probe: HeadProbe) -> KeptProofs:
    """Return the file of what runs of this very model, on such a device, have proven, beside their units."""
    device = trainer.strategy.root_device
    model = probe.identity_as_built()
    key = {
        "model": {name: value for name, value in model.items() if name not in ("weights", "pretrained", "title")},
        "modules": modules_digest(probe.backbone),
        "precision": str(trainer.precision),
        "arithmetic": arithmetic(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": versions(),
    }
    return KeptProofs(shown(Path(trainer.default_root_dir)) / "lightning_logs" / "proofs", key, probe.backbone)


def decisions_of(trainer: lightning.Trainer, probe: HeadProbe) -> list[Decision]:
    """Return what headprobe decided about the model and the data of a test, the model's first."""
    found = [*probe.decisions(), *data_of(trainer).decisions()]
    columns = [column for spec in probe.specs for column in spec.columns]
    if columns and not probe.calibrating:
        found += order_decisions(columns, data_of(trainer).identity())
    return found


def what_counts(identity: dict[str, Any], trainer: lightning.Trainer) -> dict[str, Any]:
    """Return the part of an identity that a run's key is made of.

    Left out are paths of weights and local data, which have digests, and options that change no sum.
    """
    model = dict(identity["model"])
    for name in ("weights", "pretrained", "title"):
        model.pop(name, None)
    if str(model["name"]).lower().startswith("local-dir:"):  # a path; the architecture and the digest stay
        model.pop("name")
    data = dict(identity["data"])
    if data["local"]:
        data.pop("path", None)

    # In the order of names: sums are kept by name, whatever the order of the callbacks.
    options = [statistic.options_of_sums() for statistic in statistics_of(trainer)]
    if not identity["variants"] and trainer.validating:
        return {**identity, "model": model, "data": data}
    summed = sorted(options, key=lambda of_one: of_one["name"])
    scored = [one for one in identity["statistics"] if isinstance(one, str)]
    return {**identity, "model": model, "data": data, "statistics": [*scored, *summed]}


def statistics_of(trainer: lightning.Trainer) -> list[HeadStatistic]:
    """Return the statistics of the trainer's callbacks; the model has them too, but only after their `setup`."""
    found = (getattr(callback, "statistic", None) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    return [statistic for statistic in found if isinstance(statistic, HeadStatistic)]


def run_key(identity: Mapping[str, Any]) -> str:
    """Return 16 hex digits that change whenever a number of the run could.

    Args:
        identity: Plain data: digest of the weights, transform, data set and revision, variants, statistics, versions.
    """
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def arithmetic() -> dict[str, Any]:
    """Return the settings of torch and timm that change how the same numbers are computed."""
    backends: Any = torch.backends
    if hasattr(backends, "fp32_precision"):  # torch 2.9 and later, where reading the older settings is an error
        products = [backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision]
    else:
        products = [backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32]
    overrides = {name: os.environ[name] for name in sorted(os.environ) if name.endswith("TF32_OVERRIDE")}
    return {"fused_attention": bool(use_fused_attn()), "float32_on_gpu": products, **overrides}


def versions() -> dict[str, str]:
    """Return the versions of Python and of every package that can change a number."""
    # headprobe may run from a checkout that was never installed, which has no metadata.
    own = {"python": platform.python_version(), "headprobe": __version__, "headprobe_source": source_digest()}
    return own | {name: metadata.version(name) for name in PACKAGES}


def hardware() -> dict[str, Any]:
    """Return the hardware of this process: processor, threads, GPUs."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"machine": platform.machine(), "threads": torch.get_num_threads(), "gpus": gpus}


def command_line(trainer: lightning.Trainer) -> str:
    """Return what started a run, without anything secret: the command; from Python the script, or the line that calls.

    Args:
        trainer: Runs the test. Where it is a `ProbeTrainer`, its `command` is the command of the command line, or the
            text of the call.
    """
    command = str(getattr(trainer, "command", "") or "")
    if command.startswith("headprobe "):
        return without_secrets(command)
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    if script is None:  # a notebook or a prompt, where the process's arguments are the kernel's
        return without_secrets(command or "ProbeTrainer.test") + "  (typed into Python)"
    return safe_command(["python", Path(sys.argv[0]).name, *sys.argv[1:]])


def text_of_call(frame: FrameType | None) -> str:
    """Return the lines of source code that a frame is at, as one line; empty where there is no source."""
    if frame is None:
        return ""
    found = inspect.getframeinfo(frame, context=1)
    ends = found.positions.end_lineno if found.positions else None
    lines = [linecache.getline(found.filename, number) for number in range(found.lineno, (ends or found.lineno) + 1)]
    return " ".join(line.strip() for line in lines if line.strip())


def run_directory(trainer: lightning.Trainer) -> Path:
    """Return the run's directory, as in `lightning_logs/version_0`.

    Call it from `setup` and on every process: Lightning broadcasts the name at each call, and a process that calls it
    alone hangs all of them.
    """
    return Path(trainer.log_dir or trainer.default_root_dir)
