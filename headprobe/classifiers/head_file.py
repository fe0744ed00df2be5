"""A linear head from a safetensors file: text embeddings of CLIP or SigLIP, or a linear probe.

| key | what it is |
| --- | --- |
| `weight` | `[classes, features]` |
| `bias` | `[classes]`, or one number for all classes; 0 if it is not there |
| `logit_scale` | one number, the natural logarithm of a scale, as CLIP keeps it; then logits are scaled cosines |

Without `logit_scale` logits are `weight @ feature + bias`. With it they are `exp(logit_scale) * cosine + bias`. The
file's metadata may name the classes: `classes`, a JSON list of texts in the order of the rows.
"""

import hashlib
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from headprobe.classifiers.base import FeatureClassifier, OnDevices, equal_rows, named, unit_rows, wide
from headprobe.errors import UsageError
from headprobe.text import Decision, counted, first_line

WEIGHT, BIAS, SCALE = KEYS = ("weight", "bias", "logit_scale")
NAMES = "classes"

MOST_SCALE = 8.0
"""CLIP's is at most ln 100 = 4.6 and SigLIP's about 4.7; a larger one is the scale itself, whose logarithm is meant."""

UNIT = 1e-3
"""Rows whose lengths are 1 but for this look like text embeddings."""


class LinearHead(FeatureClassifier):
    """The head of a file.

    Args:
        weight: `[classes, features]`.
        bias: `[classes]` or `[]`, None for none.
        logit_scale: Logarithm of the scale of cosines, None for plain products.
        class_names: Names of the classes.
        file: Name of the file.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        logit_scale: float | None = None,
        class_names: list[str] | None = None,
        file: str = "",
    ) -> None:
        self.classes, self.features = weight.shape
        self.class_names, self.file, self.logit_scale = class_names, file, logit_scale
        self.weight = weight.double()
        self.bias = torch.zeros((), dtype=torch.float64) if bias is None else bias.double()
        own = self.weight if logit_scale is None else unit_rows(self.weight) * math.exp(logit_scale)
        self._own, self._bias = OnDevices(own), OnDevices(self.bias)

    def logits(self, features: Tensor) -> Tensor:
        """Return products or scaled cosines, `[..., classes]`."""
        own = wide(features)
        if self.logit_scale is not None:
            own = unit_rows(own)
        return own @ self._own.on(own.device).T + self._bias.on(own.device)

    @property
    def digest(self) -> str:
        """SHA-256 of weight, bias and scale."""
        digest = hashlib.sha256(json.dumps([list(self.weight.shape), self.logit_scale]).encode())
        for tensor in (self.weight, self.bias):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def about(self) -> dict[str, Any]:
        """Return the file's name and what is in it."""
        return {
            "kind": "file",
            "file": self.file,
            "classes": self.classes,
            "features": self.features,
            "scale": None if self.logit_scale is None else math.exp(self.logit_scale),
            "digest": self.digest,
        }

    def decisions(self) -> list[Decision]:
        """Return how logits are made of the file, and classes with equal rows."""
        what = f"{self.file}, {counted(self.classes, 'class')} of {self.features} channels"
        if self.logit_scale is not None:
            how = f"logits are {math.exp(self.logit_scale):.6g} times the cosine (logit_scale)"
        else:
            how = "logits are weight @ feature + bias"
        lengths = self.weight.norm(dim=1)
        looks_normed = bool(((lengths - 1).abs() < UNIT).all())
        if self.logit_scale is None and looks_normed:
            how += ", although its rows have length 1, as text embeddings have: those need logit_scale"
        if self.class_names is None:
            how += f"; it names no classes ({NAMES} in its metadata), so rows stand for classes in the order of the"
            how += " data's or of ImageNet's, or as --data.class_map says"
        found = [Decision("classifier", f"{what}; {how} (--model.classifier)", shown=True)]
        if pairs := self._equal():
            texts = "; ".join(named(pair, self.class_names) for pair in pairs[:3])
            text = f"{counted(len(pairs), 'pair')} of classes with equal rows, of which the first is predicted: {texts}"
            found.append(Decision("duplicate classes", text, shown=True))
        return found

    def _equal(self) -> list[tuple[int, int]]:
        """Return pairs of classes whose logits are always equal."""
        bias = self.bias.expand(self.classes)
        rows = torch.cat([self.weight if self.logit_scale is None else unit_rows(self.weight), bias[:, None]], dim=1)
        largest = rows.norm(dim=1).max().clamp_min(torch.finfo(torch.float64).tiny)
        return equal_rows((rows / largest).numpy())


def read_head(path: str | Path) -> LinearHead:
    """Read a head.

    Raises:
        UsageError: There is no such file, it is no safetensors, or it does not hold a head.
    """
    file = Path(path)
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  # no dict
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        why = "is no file" if not file.is_file() else f"is not readable as safetensors ({first_line(error)})"
        raise UsageError(
            f"--model.classifier must name a safetensors file with {WEIGHT}, and perhaps {BIAS} and {SCALE}: it {why}, "
            f"got {str(path)!r}"
        ) from error
    _check_keys(tensors, path)
    weight, bias, scale = (tensors.get(key) for key in KEYS)
    if weight is None or weight.dim() != 2 or min(weight.shape) < 1:
        shape = "none" if weight is None else str(list(weight.shape))
        raise _wrong(path, f"{WEIGHT} must be [classes, features]", shape)
    if bias is not None and bias.numel() == 1:
        bias = bias.reshape(())
    elif bias is not None and bias.shape != weight.shape[:1]:
        raise _wrong(path, f"{BIAS} must be [{len(weight)}], one for each row of {WEIGHT}, or one number", bias.shape)
    if scale is not None and (zeros := (~weight.double().any(dim=1)).nonzero()).numel():
        rule = f"each row of {WEIGHT} must have a direction where {SCALE} makes logits of cosines"
        raise _wrong(path, rule, f"zeros in row {int(zeros[0])}")
    names = _names(metadata.get(NAMES), len(weight), path)
    return LinearHead(weight, bias, _scale(scale, path), names, file.name)


def _check_keys(tensors: dict[str, Tensor], path: str | Path) -> None:
    strange = sorted(tensors.keys() - set(KEYS))
    if strange or WEIGHT not in tensors:
        got = ", ".join(strange[:5]) or ", ".join(tensors) or "none"
        raise _wrong(path, f"its tensors must be called {WEIGHT}, and perhaps {BIAS} and {SCALE}", got)
    for key, tensor in tensors.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        if not tensor.is_floating_point():
            raise _wrong(path, f"{key} must hold floating point", kind)
        if not bool(tensor.double().isfinite().all()):
            raise _wrong(path, f"{key} must hold finite numbers", "NaN or infinity")


def _scale(scale: Tensor | None, path: str | Path) -> float | None:
    if scale is None:
        return None
    if scale.numel() != 1:
        raise _wrong(path, f"{SCALE} must be one number", list(scale.shape))
    found = float(scale)
    if abs(found) > MOST_SCALE:
        raise _wrong(
            path, f"{SCALE} must be the natural logarithm of the scale, as CLIP keeps it (4.605 for 100)", f"{found:g}"
        )
    return found


def _names(written: str | None, classes: int, path: str | Path) -> list[str] | None:
    if written is None:
        return None
    try:
        names = json.loads(written)
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(names) != classes:
        raise _wrong(
            path,
            f"{NAMES} in its metadata must be a JSON list of {counted(classes, 'text')}, one for each row of {WEIGHT}",
            written[:60],
        )
    twice = [name for name, times in Counter(names).items() if times > 1 and name]
    if twice:
        raise _wrong(path, f"{NAMES} in its metadata must name each class once", f"{twice[0]!r} twice")
    return names


def _wrong(path: str | Path, rule: str, got: object) -> UsageError:
    shown = list(got) if isinstance(got, torch.Size) else got
    return UsageError(f"--model.classifier {path}: {rule}, got {shown}")
