"""What a calibration knows of every layer's heads, and the file that keeps it: `calibration.safetensors`.

A head's constants are those of its slot in the unmasked model, over all tokens of all calibration images; padding of
windows does not count. Channels are ordered by head, then by the channel in the head.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from headprobe.errors import RunError, UsageError
from headprobe.files import write_bytes, write_text
from headprobe.metrics.arrays import FloatArray
from headprobe.mixture import SCHEMA, refuse_newer

CONSTANTS, ABOUT = "calibration.safetensors", "calibration.json"

SCORES, CLASSIFIER = "scores", "classifier"

RESCORED_ORDERS = "rescored"
"""Where a calibration keeps the orders of heads whose scores were computed anew step by step."""

METADATA = "headprobe"  # the key of the file's metadata that says where the constants come from

RANK_FACTOR = 4.0
"""c of the rank cut, as in `headprobe.metrics.similarity.subspaces`."""


@dataclass(frozen=True)
class LayerConstants:
    """The slots of one layer over the calibration images.

    Attributes:
        samples: Tokens of all images.
        mean: `[heads, head_dim]`.
        covariance: `[heads * head_dim, heads * head_dim]`, divided by `samples`; None where nothing needs it.
        resolution: Spacing of the numbers that the model computed in, relative: 1.2e-7 for float32.
        position: Mean by token position `[positions, heads, head_dim]`, in the order of the slots' rows and tokens;
            None where nothing needs it.
        optimal: The best constant of each head `[heads, head_dim]`, NaN for heads that were not optimised; or None.
        scores: Importance scores by name `[heads]`, NaN where one is not defined; none where they were not asked for.
    """

    samples: int
    mean: FloatArray
    covariance: FloatArray | None = None
    resolution: float = float(np.finfo(np.float32).eps)
    position: FloatArray | None = None
    optimal: FloatArray | None = None
    scores: Mapping[str, FloatArray] = field(default_factory=dict)


@dataclass(frozen=True)
class Calibration:
    """What was fitted, and on what.

    Attributes:
        layers: The constants of every layer, in the model's order; none where only a classifier was fitted.
        about: Where they come from, as JSON values: model, weights, transform, data, rows, number of images.
        classifier: What a classifier that was fitted consists of, by name; only in what is written to a file.
    """

    layers: Sequence[LayerConstants]
    about: Mapping[str, Any] = field(default_factory=dict)
    classifier: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def scores(self) -> dict[str, dict[tuple[int, int], float]]:
        """The importance scores by name and (layer, head); empty where there are none."""
        found: dict[str, dict[tuple[int, int], float]] = {}
        for number, layer in enumerate(self.layers):
            for name, values in layer.scores.items():
                found.setdefault(name, {}).update({(number, head): float(one) for head, one in enumerate(values)})
        return found

    @property
    def orders(self) -> dict[tuple[str, str], list[tuple[int, int]]]:
        """The first heads in the order of scores that were computed anew, by score and direction."""
        return {
            (one["score"], one["direction"]): [(int(layer), int(head)) for layer, head in one["heads"]]
            for one in self.about.get(RESCORED_ORDERS, {"orders": ()})["orders"]
        }


@dataclass(frozen=True)
class Prediction:
    """The affine prediction of masked channels from kept ones: `z_S = B z_K + c`.

    Attributes:
        kept: Channels that predict `[kept]`, as numbers in the order of the constants.
        masked: Channels that are predicted `[masked]`.
        matrix: B `[masked, kept]`.
        offset: c `[masked]`.
        rank: Directions of the kept channels that vary.
    """

    kept: np.ndarray[Any, np.dtype[np.int64]]
    masked: np.ndarray[Any, np.dtype[np.int64]]
    matrix: FloatArray
    offset: FloatArray
    rank: int


def predict_masked(layer: LayerConstants, keep: Sequence[bool]) -> Prediction:
    """Return the least-squares prediction of a layer's masked heads from the heads that it keeps.

    Closed form from the moments: B = C_SK C_KK^+, c = m_S - B m_K. Directions of the kept channels that vary by no more
    than rounding are left out. Where nothing is kept the prediction is the mean.

    Args:
        layer: The layer's constants, with their covariance.
        keep: `[heads]`, True = keep.

    Raises:
        UsageError: The constants hold no covariance.
    """
    if layer.covariance is None:
        raise UsageError("the ablation linear needs constants with a covariance, got a calibration of means alone")
    kept_channels = np.repeat(np.asarray(keep, dtype=bool), layer.mean.shape[1])  # [heads * head_dim]
    kept, masked = np.flatnonzero(kept_channels), np.flatnonzero(~kept_channels)
    mean = layer.mean.reshape(-1)

    if not len(kept) or not len(masked):
        return Prediction(kept, masked, np.zeros((len(masked), len(kept))), mean[masked], 0)
    squares, axes = np.linalg.eigh(layer.covariance[np.ix_(kept, kept)])
    varies = squares > _rank_cut(layer, kept, squares)
    axes, squares = axes[:, varies], squares[varies]  # [kept, rank], [rank]

    # C_SK U / lambda: the slopes along the principal axes, then back to channels
    slopes = layer.covariance[np.ix_(masked, kept)] @ axes / squares  # [masked, rank]
    matrix = slopes @ axes.T
    return Prediction(kept, masked, matrix, mean[masked] - matrix @ mean[kept], len(squares))


def without_heads(layer: LayerConstants, keep: NDArray[np.bool_]) -> LayerConstants:
    """Return mean and covariance of the heads that are kept.

    Args:
        layer: The layer's constants.
        keep: `[heads]`, True = keep.
    """
    channels = np.flatnonzero(np.repeat(keep, layer.mean.shape[1]))
    covariance = None if layer.covariance is None else layer.covariance[np.ix_(channels, channels)]
    return LayerConstants(layer.samples, layer.mean[keep], covariance, layer.resolution)


def _rank_cut(layer: LayerConstants, kept: np.ndarray[Any, np.dtype[np.int64]], squares: FloatArray) -> float:
    """Return the variance up to which a direction may be rounding alone.

    The larger of two bounds, c being `RANK_FACTOR`: `c * max(dims, samples) * eps64 * largest` bounds the rounding of
    float64 sums, and `c * resolution^2 * mean square` the rounding of the outputs themselves.
    """
    of_sums = max(len(kept), layer.samples) * float(np.finfo(np.float64).eps) * float(squares.max(initial=0.0))
    variances = np.diagonal(layer.covariance)[kept] if layer.covariance is not None else np.zeros(len(kept))
    mean_square = float(np.max(np.square(layer.mean.reshape(-1)[kept]) + variances))
    return RANK_FACTOR * max(of_sums, layer.resolution**2 * mean_square)


# -- the file ----------------------------------------------------------------------------------------------------------


def to_bytes(calibration: Calibration) -> bytes:
    """Return the content of `calibration.safetensors`.

    Keys are `layers.N.samples` int64 `[]`, `layers.N.mean` float64 `[heads, head_dim]`, `layers.N.resolution` float64
    `[]`, and where they were fitted `layers.N.covariance` `[channels, channels]`, `layers.N.position`
    `[positions, heads, head_dim]`, `layers.N.optimal` `[heads, head_dim]`, `layers.N.scores.NAME` `[heads]`. Of a
    classifier that was fitted `classifier.means` float64 `[classes, features]`, or `classifier.bank` float32
    `[images, features]` and `classifier.labels` int64 `[images]`; and `classifier.images` int64 `[classes]`.
    """
    tensors: dict[str, Any] = {
        f"{CLASSIFIER}.{name}": np.ascontiguousarray(values) for name, values in calibration.classifier.items()
    }
    for number, layer in enumerate(calibration.layers):
        tensors[f"layers.{number}.samples"] = np.asarray(layer.samples, dtype=np.int64)
        tensors[f"layers.{number}.resolution"] = np.asarray(layer.resolution, dtype=np.float64)
        for name in ("mean", "covariance", "position", "optimal"):
            values = getattr(layer, name)
            if values is not None:
                tensors[f"layers.{number}.{name}"] = np.ascontiguousarray(values, dtype=np.float64)
        for name, values in layer.scores.items():
            tensors[f"layers.{number}.{SCORES}.{name}"] = np.ascontiguousarray(values, dtype=np.float64)
    return save(tensors, metadata={METADATA: _about_text(calibration)})


def from_bytes(content: bytes) -> Calibration:
    """Return the calibration that `to_bytes` was given.

    Raises:
        ValueError: The content is something else (or KeyError, IndexError, SafetensorError).
    """
    length = int.from_bytes(content[:8], "little")  # of the header, by the format's own definition
    about = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][METADATA])
    tensors = load(content)
    if not isinstance(about, dict):
        raise ValueError(f"{METADATA} must be an object, got {type(about).__name__}")
    refuse_newer(about.pop("schema", None), Path(CONSTANTS))
    start = f"{CLASSIFIER}."
    classifier = {name.removeprefix(start): values for name, values in tensors.items() if name.startswith(start)}
    if not tensors and CLASSIFIER not in about:
        raise ValueError("it holds no tensors")
    layers = [int(name.split(".")[1]) for name in tensors if not name.startswith(start)]
    count = 1 + max(layers, default=-1)
    return Calibration([_layer(tensors, number) for number in range(count)], about, classifier)


def save_calibration(calibration: Calibration, directory: Path) -> None:
    """Write `calibration.safetensors` and `calibration.json`, each whole or not at all.

    Raises:
        RunError: They cannot be written.
    """
    write_bytes(directory / CONSTANTS, to_bytes(calibration))
    write_text(directory / ABOUT, f"{_about_text(calibration)}\n")


def _about_text(calibration: Calibration) -> str:
    return json.dumps({"schema": SCHEMA, **calibration.about}, indent=1, sort_keys=True)


def digest_of(calibration: Calibration) -> str:
    """Return the SHA-256 of all constants and of where they come from."""
    return hashlib.sha256(to_bytes(calibration)).hexdigest()


def read_calibration(path: Path) -> Calibration:
    """Read the file of `save_calibration`, or the one in a run's directory.

    Raises:
        UsageError: It is not there, or is no such file.
    """
    file = path / CONSTANTS if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"--calibration-file must name a run with a {CONSTANTS}, or that file, got {str(path)!r}")
    try:
        return from_bytes(file.read_bytes())
    except (SafetensorError, OSError, KeyError, ValueError, IndexError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{file.name} does not hold constants of a headprobe calibration ({reason}), got {str(path)!r}"
        ) from None


def _layer(tensors: Mapping[str, Any], number: int) -> LayerConstants:
    prefix = f"layers.{number}."
    mean = np.asarray(tensors[f"{prefix}mean"], dtype=np.float64)
    if mean.ndim != 2:
        raise ValueError(f"layers.{number}.mean must be [heads, head_dim], got {list(mean.shape)}")
    optional = {name: tensors.get(f"{prefix}{name}") for name in ("covariance", "position", "optimal")}
    covariance = optional["covariance"]
    if covariance is not None and covariance.shape != (mean.size, mean.size):
        raise ValueError(f"layers.{number}.covariance must be [{mean.size}, {mean.size}]")
    for name, values in {"mean": mean, "covariance": covariance, "position": optional["position"]}.items():
        if values is not None and not np.isfinite(values).all():
            raise ValueError(f"{prefix}{name} holds NaN or infinity")
    samples, resolution = int(tensors[f"{prefix}samples"]), float(tensors[f"{prefix}resolution"])
    start = f"{prefix}{SCORES}."
    scores = {name.removeprefix(start): values for name, values in tensors.items() if name.startswith(start)}
    if any(values.shape != mean.shape[:1] for values in scores.values()):
        raise ValueError(f"layers.{number}.{SCORES} must be [{len(mean)}]")
    return LayerConstants(samples, mean, covariance, resolution, optional["position"], optional["optimal"], scores)


OF_MODEL = (
    "name",
    "weights_sha256",
    "options",
    "num_classes",
    "classifier",
    "data_config",
    "heads_per_layer",
    "layers",
    "semantics",
)
"""What must be equal in a model's identity where constants are used again."""


def refuse_another(
    calibration: Calibration, model: Mapping[str, Any], kinds: Sequence[str], scores: bool = False
) -> None:
    """Refuse constants that are not this model's, or that lack what an ablation needs.

    Args:
        calibration: The constants.
        model: The identity of the model.
        kinds: Kinds of ablation that are fitted.
        scores: Whether scores of heads are wanted.

    Raises:
        UsageError: With what differs.
    """
    fitted = calibration.about.get("model", {})
    # of a model in hand less is known than of one that headprobe built
    known = [name for name in OF_MODEL if name in model]
    differ = [name for name in known if fitted.get(name) != json.loads(json.dumps(model[name]))]
    if differ:
        name, listed = differ[0], ", ".join(differ)
        raise UsageError(
            f"the calibration was fitted on another model, or on images prepared in another way ({listed} differ): fit "
            f"it anew without --calibration-file, got {name} {_shown(fitted.get(name))} where the model has "
            f"{_shown(model[name])}"
        )
    heads, wanted = [len(layer.mean) for layer in calibration.layers], list(model["heads_per_layer"])
    if heads != wanted and (heads or kinds or scores):
        raise UsageError(
            f"the calibration must have constants of every head, {wanted} in its layers: fit it anew without "
            f"--calibration-file, got {heads}"
        )
    held = {"mean", *("linear" for layer in calibration.layers[:1] if layer.covariance is not None)}
    held |= {"position" for layer in calibration.layers[:1] if layer.position is not None}
    held |= {"optimal" for layer in calibration.layers[:1] if layer.optimal is not None}
    if scores and not calibration.scores:
        raise UsageError(
            "the calibration holds no scores of heads: fit it anew without --calibration-file, got one without scores"
        )
    missing = [kind for kind in kinds if kind not in held]
    if missing:
        raise UsageError(
            f"the calibration holds no constants of the ablation {missing[0]}: fit it anew without --calibration-file, "
            f"or choose among {', '.join(sorted(held))}, got {missing[0]}"
        )


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def check_finite(calibration: Calibration) -> None:
    """Refuse constants with NaN or infinity: every masked model would be broken.

    Raises:
        RunError: A layer's are.
    """
    for number, layer in enumerate(calibration.layers):
        for name in ("mean", "covariance", "position"):
            values = getattr(layer, name)
            if values is not None and not np.isfinite(values).all():
                raise RunError(
                    f"the calibration's {name} of layer {number} holds NaN or infinity: nothing can be fitted"
                )
