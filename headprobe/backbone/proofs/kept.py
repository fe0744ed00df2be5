"""What trials found and proved of a model, kept as JSON: a run of the very same model need not wait for them again.

Kept are joins, shortcuts, and how outputs are read. What a run proves of masks it proves anew each time. The key holds
all that trials depend on, the weights too: zeros in them can hide a wrong join. A file that is broken, or of another
key, counts as none. The code of classes that are neither timm's nor torch's is in no key, so nothing is kept of them.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from headprobe.backbone.growing.beginnings import Join
from headprobe.backbone.growing.row_plan import Batched
from headprobe.backbone.growing.shortcuts import PooledTokens, SharedCore, Shortcuts
from headprobe.backbone.outputs import Outputs
from headprobe.files import write_text

Passes = tuple[tuple[Join, ...], Shortcuts]
"""Where masks join, by layer, and what a growing pass leaves out."""

IN_KEY = ("timm.", "torch.")
"""Packages whose versions are in the key."""


@dataclass
class Proven:
    """What was found and proven of a model.

    Attributes:
        outputs: How its outputs are read.
        passes: Joins and shortcuts, by the layers at which masks join.
        file: Where this was kept; None where it was found by this run.
    """

    outputs: Outputs
    passes: dict[tuple[int, ...], Passes] = field(default_factory=dict)
    file: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        passes = [
            {"layers": layers, "joins": [asdict(join) for join in joins], "shortcuts": asdict(shortcuts)}
            for layers, (joins, shortcuts) in self.passes.items()
        ]
        found: dict[str, Any] = json.loads(json.dumps({"outputs": asdict(self.outputs), "passes": passes}))
        return found

    @classmethod
    def from_json(cls, data: Mapping[str, Any], backbone: nn.Module, file: Path | None = None) -> "Proven":
        """Return the object of `to_json`.

        Raises:
            KeyError: The data is another; so do `TypeError`, `ValueError`, and `AttributeError`, for a module that the
                model does not have.
        """
        passes = {}
        for one in data["passes"]:
            joins = tuple(_join(join) for join in one["joins"])
            shortcuts = _shortcuts(one["shortcuts"])
            for module in _modules(joins, shortcuts):
                backbone.get_submodule(module)
            passes[tuple(map(int, one["layers"]))] = joins, shortcuts
        return cls(Outputs(**data["outputs"]), passes, file)


class KeptProofs:
    """The file of one key.

    Args:
        folder: Where files of all keys are.
        key: All that trials depend on, as plain data.
        backbone: The model.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any], backbone: nn.Module) -> None:
        self._key: dict[str, Any] = json.loads(json.dumps(key, sort_keys=True, default=str))
        self.file = folder / f"{_digest(self._key)[:16]}.json"
        self._backbone, self._keeps = backbone, is_in_key(backbone)

    def read(self) -> Proven | None:
        """Return what is kept; None where nothing is, or the file is broken or another's."""
        if not self._keeps:
            return None
        try:
            content = json.loads(self.file.read_text(encoding="utf-8"))
            if content["key"] != self._key or content["sha256"] != _digest(content["proven"]):
                return None
            return Proven.from_json(content["proven"], self._backbone, self.file)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def write(self, proven: Proven) -> None:
        """Keep what was proven, beside what another run may have kept meanwhile.

        Raises:
            RunError: The file cannot be written.
        """
        if not self._keeps:
            return
        before = self.read()
        if before is not None and before.passes.keys() >= proven.passes.keys():
            return
        passes = proven.passes if before is None else before.passes | proven.passes
        data = Proven(proven.outputs, passes).to_json()
        content = {"key": self._key, "sha256": _digest(data), "proven": data}
        write_text(self.file, json.dumps(content, indent=1) + "\n")


def is_in_key(backbone: nn.Module) -> bool:
    """Return whether all code of a model is that of packages whose versions are in the key."""
    return all(
        type(module).__module__.startswith(IN_KEY) and not {"forward", "forward_head"} & vars(module).keys()
        for module in backbone.modules()
    )


def modules_digest(backbone: nn.Module) -> str:
    """Return a digest of the names and classes of all modules, and of their settings as torch prints them."""
    return _digest([*((name, type(module).__qualname__) for name, module in backbone.named_modules()), str(backbone)])


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _modules(joins: tuple[Join, ...], shortcuts: Shortcuts) -> list[str]:
    """Return the names of all modules that hooks will be on."""
    cores = [name for module, core in shortcuts.cores for name in (module, core.entry)]
    pooled = [shortcuts.pooled.block, shortcuts.pooled.entry] if shortcuts.pooled else []
    return [*(join.module for join in joins), *cores, *pooled]


def _join(data: Mapping[str, Any]) -> Join:
    return Join(**{**data, "batched": _batched(data["batched"])})


def _shortcuts(data: Mapping[str, Any]) -> Shortcuts:
    cores = []
    for module, core in data["cores"]:
        cores.append((str(module), SharedCore(**{**core, "batched": _batched(core["batched"])})))
    pooled = None if data["pooled"] is None else PooledTokens(**data["pooled"])
    return Shortcuts(tuple(cores), pooled, bool(data["beginnings"]))


def _batched(data: Any) -> Batched:
    return tuple((tuple(path), int(rows)) for path, rows in data)
