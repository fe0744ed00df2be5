"""The attention of every head on a few images: from a model's layers to the arrays of `examples.npz`."""

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from headprobe.backbone.capture.layer_record import LayerRecord
from headprobe.describe.base import Judged, Observation, Subject
from headprobe.errors import RunError
from headprobe.metrics.accuracy.paired_accuracy import top_five
from headprobe.metrics.attention.examples import Examples, thumbnail_of, thumbnail_size
from headprobe.metrics.attention.image_maps import WITHOUT_MAP, ImageMap, MapKind, as_bytes
from headprobe.metrics.attention.weights_chunk import WeightsChunk
from headprobe.units.tree import Arrays


class ExampleMaps:
    """What each layer's map of an image is, for one model; the images are kept in `Examples`, by unit.

    Args:
        subject: The model.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.maps = [_map_of_layer(subject, layer) for layer in range(len(subject.facts))]  #: None without any

    def empty(self, images: int) -> Examples:
        """Make room for so many images."""
        layout, shapes = self.subject.layout, []
        for own, heads in zip(self.maps, layout.heads_per_layer, strict=True):
            shapes.append(None if own is None else (heads, *own.size))
        return Examples(images, shapes, thumbnail_size(layout.input_size[1:]))

    def observe(self, observation: Observation, examples: Examples) -> None:
        """Keep the baseline's maps of the images that are examples so far; another image costs no more than a hash."""
        record, rows = observation.records[0], observation.rows.tolist()
        if observation.layer == 0:
            examples.offer(observation.unit, rows)
        own, kept = self.maps[observation.layer], examples.of_unit(observation.unit)
        if own is None:
            return
        for image, row in enumerate(rows):
            if row in kept:
                maps, largest = as_bytes(_map_of_image(record, image, own))
                kept[row].maps[observation.layer], kept[row].largest[observation.layer] = maps, largest

    def judged(self, batch: Judged, examples: Examples) -> None:
        """Note what the examples of a batch are, and what the model takes them for."""
        kept = examples.of_unit(batch.unit)
        for image, row in enumerate(batch.rows.tolist()):
            if row not in kept:
                continue
            kept[row].thumbnail = thumbnail_of(batch.images[image])
            kept[row].label = int(batch.labels[image])
            # bytes in the name of a file that are no text are written as escapes
            source = batch.sources[image] if batch.sources else ""
            kept[row].source = source.encode(errors="backslashreplace").decode()
            logits = batch.logits[image]
            if len(logits) and bool(logits.isfinite().all()):  # without a classifier there are none
                place = int(top_five(logits)[0])
                kept[row].prediction = place if batch.classes is None else int(batch.classes[place])

    def arrays(self, examples: Examples, class_names: Sequence[str]) -> Arrays:
        """Return the arrays of `examples.npz`; none where no layer has a map.

        Args:
            examples: The images.
            class_names: Names of the model's classes, "" for one without; none where they are unknown.
        """
        if not any(self.maps):
            return {}

        def named(number: int) -> str:
            return class_names[number] if 0 <= number < len(class_names) else ""

        found: Arrays = examples.to_arrays()
        for name in ("label", "prediction"):
            found[f"{name}_name"] = np.array([named(number) for number in found[name].tolist()], dtype=str)
        found["source"] = np.array(json.loads(found["source"].tobytes()), dtype=str)
        found["kind"] = np.array(["" if own is None else own.kind.value for own in self.maps])
        return found

    def undefined(self) -> dict[str, list[int]]:
        """Return by reason the layers without a map."""
        found: dict[str, list[int]] = {}
        for layer, own in enumerate(self.maps):
            if own is None:
                why = self.subject.facts[layer].undefined.get("confidence", WITHOUT_MAP)
                found.setdefault(why, []).append(layer)
        return found


def _map_of_layer(subject: Subject, layer: int) -> ImageMap | None:
    own, before = subject.facts[layer], subject.facts[:layer]
    if not own.attention.pooled:
        return ImageMap.of(own.attention)
    class_query = subject.layout.layers[layer].kind == "class"
    return ImageMap.of_pooling(own.attention, [facts.outputs for facts in before], class_query)


def _map_of_image(record: LayerRecord, image: int, own: ImageMap) -> Tensor:
    """Return the map of one image of a record, `[heads, rows, columns]`.

    Raises:
        RunError: The layer has no weights in this pass.
    """
    if record.attention is None:
        raise RunError(f"layer {record.layer} has no attention weights between tokens")
    windows = record.attention.shape[0] // record.images
    attention = record.attention.rows(slice(image * windows, (image + 1) * windows))
    if own.kind == MapKind.CLASS:  # one query, the first, of all that are there
        weights = attention.weights(slice(0, windows), slice(0, 1))
        return own.reduce([WeightsChunk(slice(0, windows), slice(0, 1), weights)])
    return own.reduce(replace(record, images=1, attention=attention).weights())
