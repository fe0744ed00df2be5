"""What a run is, as plain data: all that changes its numbers, from which its key follows."""

import os
import sys
from pathlib import Path
from typing import Any

import lightning
import torch
from timm.layers import use_fused_attn

from headprobe.callbacks.describing import head_callbacks
from headprobe.module import HeadProbe
from headprobe.redact import safe_command
from headprobe.run.record import versions


def identify(trainer: lightning.Trainer, probe: HeadProbe) -> dict[str, Any]:
    """Return all that changes the numbers of a test, known before its first image.

    The row plan follows from the masks, the batch size and the row budget that was asked for.

    Args:
        trainer: Runs the test.
        probe: The model with its masks.
    """
    # a unit is not finished without its records, where a callback keeps a row per image
    records = any(getattr(callback, "keeps_records", False) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    scored = ["paired_accuracy", *["per_class"] * probe.per_class, *["records"] * records]
    statistics = [callback.statistic.options() for callback in head_callbacks(trainer)]
    device = trainer.strategy.root_device
    return {
        "model": probe.identity(),
        "data": trainer.datamodule.identity(),  # type: ignore[attr-defined]  # set by Lightning where there is one
        # A list: the sums have the variants' order.
        "variants": [[one.mask.name, one.mask.mask.digest, one.ablation, one.draw] for one in probe.variants],
        "statistics": [*scored, *statistics],
        "precision": str(trainer.precision),
        "arithmetic": arithmetic(),
        "device": device.type,
        "batch_size": trainer.datamodule.batch_size,  # type: ignore[attr-defined]
        "row_budget": probe.row_budget or "usual",
        "versions": versions(),
    }


def arithmetic() -> dict[str, Any]:
    """Return the settings of torch and timm that change how the same numbers are computed."""
    backends: Any = torch.backends
    if hasattr(backends, "fp32_precision"):  # torch 2.9 and later, which refuses to be asked the older way too
        products = [backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision]
    else:
        products = [backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32]
    overrides = {name: os.environ[name] for name in sorted(os.environ) if name.endswith("TF32_OVERRIDE")}
    return {"fused_attention": bool(use_fused_attn()), "float32_on_gpu": products, **overrides}


def what_counts(numbers: dict[str, Any], trainer: lightning.Trainer) -> dict[str, Any]:
    """Return what a run's key is made of.

    Places of weights and local data are left out, digests say what they are, and so is what no sum depends on.
    """
    model = {name: value for name, value in numbers["model"].items() if name not in ("weights", "pretrained")}
    data = {name: value for name, value in numbers["data"].items() if name != "path" or not numbers["data"]["local"]}
    # Sums are kept by name, whatever the order of the callbacks.
    summed = sorted(
        (callback.statistic.options_of_sums() for callback in head_callbacks(trainer)), key=lambda one: one["name"]
    )
    scored = [one for one in numbers["statistics"] if isinstance(one, str)]
    return {**numbers, "model": model, "data": data, "statistics": [*scored, *summed]}


def command_line() -> str:
    """Return the command that this process was started with, without anything secret."""
    return safe_command(["headprobe", *sys.argv[1:]])


# -- Where a run's files go --


def run_directory(trainer: lightning.Trainer) -> Path:
    """Return the run's directory, as in `lightning_logs/version_0`.

    Call it from `setup` and on every process: Lightning broadcasts the name each time it is asked, and a process that
    asks alone hangs all of them.
    """
    return Path(trainer.log_dir or trainer.default_root_dir)
