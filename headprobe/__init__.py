"""What does each attention head do? Mask heads of any timm vision transformer and measure what the model loses.

The public names are loaded on first use, so that `import headprobe` is cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headprobe.api import ablate, check
    from headprobe.data.datamodule import ImageNetDataModule
    from headprobe.errors import RunError, UsageError
    from headprobe.loaded.run import Run, load_run
    from headprobe.loaded.runs import Runs, load_runs
    from headprobe.masks.spec import MaskSpec
    from headprobe.module import HeadProbe
    from headprobe.pruning.load import load_pruned, remove_heads, save_pruned
    from headprobe.trainer import ProbeTrainer

__version__ = "0.1.0"
__all__ = [
    "HeadProbe",
    "ImageNetDataModule",
    "MaskSpec",
    "ProbeTrainer",
    "Run",
    "RunError",
    "Runs",
    "UsageError",
    "ablate",
    "check",
    "load_pruned",
    "load_run",
    "load_runs",
    "remove_heads",
    "save_pruned",
]

_HOMES = {
    "HeadProbe": "headprobe.module",
    "ImageNetDataModule": "headprobe.data.datamodule",
    "MaskSpec": "headprobe.masks.spec",
    "ProbeTrainer": "headprobe.trainer",
    "Run": "headprobe.loaded.run",
    "RunError": "headprobe.errors",
    "Runs": "headprobe.loaded.runs",
    "UsageError": "headprobe.errors",
    "ablate": "headprobe.api",
    "check": "headprobe.api",
    "load_pruned": "headprobe.pruning.load",
    "load_run": "headprobe.loaded.run",
    "load_runs": "headprobe.loaded.runs",
    "remove_heads": "headprobe.pruning.load",
    "save_pruned": "headprobe.pruning.load",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its home."""
    if name not in _HOMES:
        raise AttributeError(f"module 'headprobe' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)
