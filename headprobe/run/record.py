"""What makes a run repeatable: its key (all that changes numbers) and its record, `run.json`."""

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import headprobe
from headprobe import __version__

PACKAGES = ("torch", "torchvision", "timm", "lightning", "torchmetrics", "datasets", "pillow", "numpy")


def versions() -> dict[str, str]:
    """Return the versions of Python and of every package that can change a number."""
    # headprobe may run from a checkout that was never installed, which has no metadata
    own = {"python": platform.python_version(), "headprobe": __version__, "headprobe_source": source_digest()}
    return own | {name: metadata.version(name) for name in PACKAGES}


def source_digest() -> str:
    """Return 12 hex digits of the SHA-256 of this package's code: between releases it changes under one version."""
    package = Path(headprobe.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package).as_posix()}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def hardware() -> dict[str, Any]:
    """Return what the run computed on: processor, threads, GPU."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"machine": platform.machine(), "threads": torch.get_num_threads(), "gpus": gpus}


def run_key(parts: Mapping[str, Any]) -> str:
    """Return 16 hex digits that change whenever a number of the run could.

    Args:
        parts: Plain data: weights' digest, transform, data set and revision, masks, ablation, statistics, row plan,
            versions.
    """
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
