"""The images of `examples.npz` with every head's attention, packed for the cards."""

import base64
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from headprobe.run.load import RunFiles

KINDS = {
    "class": "the attention of the class token to every patch",
    "pooling": "the attention of the learned queries to every patch, their mean",
    "received": "the attention that every patch gets, the mean over all patches that look",
}
"""Whose attention a layer's map shows, in words."""


def examples_of(run: RunFiles) -> dict[str, Any] | None:
    """Return the images of a run, each once, and the maps of every layer `[images, heads, rows, columns]`; or None."""
    found = run.arrays("examples.npz")
    if not found or not len(found["thumbnail"]):
        return None
    layers = [name for name in found if name.startswith("layer_") and not name.endswith("_max")]
    return {
        "images": [_image(found, number) for number in range(len(found["thumbnail"]))],
        "maps": {str(int(name.removeprefix("layer_"))): found[name] for name in layers},
        "most": {str(int(name.removeprefix("layer_"))): found[f"{name}_max"] for name in layers},
        "kinds": [KINDS.get(str(kind), "") for kind in found["kind"]],
    }


def _image(found: dict[str, NDArray[Any]], number: int) -> dict[str, Any]:
    """Return one image with what it is and what the model took it for."""
    texts = {name: _named(found, name, number) for name in ("label", "prediction")}
    thumbnail = found["thumbnail"][number]
    return {
        **texts,
        "right": bool(found["label"][number] == found["prediction"][number]),
        "source": str(found["source"][number]),
        "size": list(thumbnail.shape[:2]),
        "picture": _png(thumbnail),
    }


def _named(found: dict[str, NDArray[Any]], name: str, number: int) -> str:
    """Return the name of an image's class, or its number where it has none."""
    return str(found[f"{name}_name"][number]) or f"class {int(found[name][number])}"


def _png(pixels: NDArray[np.uint8]) -> str:
    """Return an image as the address of its own bytes, without loss."""
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
