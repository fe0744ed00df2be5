"""ImageNetDataModule: an image dataset with labels, streamed in units so that every image is scored exactly once."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, Protocol

from lightning import LightningDataModule
from torch.utils.data import DataLoader

from headprobe.data.decode import ImageReader
from headprobe.data.labels.class_map import ClassMap
from headprobe.data.labels.numbering import (
    Numbering,
    check_texts,
    number_labels,
    of_other_split,
    restricted,
)
from headprobe.data.labels.read_class_map import read_class_map
from headprobe.data.parts import CalibrationRows, calibrating_part, judged_part, parts_in_words, rows_apart
from headprobe.data.sources.source import (
    Request,
    Source,
    UnitRule,
    first_labels,
    is_local,
    local_name,
    open_source,
    some,
)
from headprobe.data.stream import FittedData, ImageBatch, UnitStream, default_workers
from headprobe.errors import RunError, UsageError
from headprobe.processes import on_all
from headprobe.text import Decision, counted


class FinishedUnits(Protocol):
    """Units that were scored before."""

    @property
    def rows(self) -> Mapping[int, int]:
        """How many rows each of these units has, by the unit's number."""


class ImageNetDataModule(LightningDataModule):
    """An image dataset with labels: the bundled digits, a local folder or Parquet files, or a hub dataset.

    Args:
        path: `digits` (bundled), a hub id, a local folder (Parquet files, or one folder per class), or a Parquet glob.
        name: Configuration of a hub dataset that has several.
        split: Split to score; by default validation, else test, else the only one.
        revision: Branch, tag or commit of a hub dataset.
        image_column: Column of images.
        label_column: Column of labels.
        class_map: JSON, YAML or text file: the model's class of each dataset class, or the model's class names in its
            order; or `identity`, `sorted` or `natural`.
        restrict_classes: With a dataset of fewer classes than the model, choose among these classes only.
        max_images: Score only this many images, an even share of every unit, spread over its rows.
        on_bad_image: What an image that cannot be read does: `error` lists all at the end and fails the run, `skip`
            leaves them out of all numbers, `wrong` counts them as wrong.
        batch_size: Images per batch; a batch never crosses a unit.
        num_workers: Processes that read and decode, per device; by default chosen by cores and units.
        unit: What is read as one piece: `auto` is row groups of local files, whole files of the hub.
        calibration: Which images fit constants where an ablation needs them: `half` of the rows, by a hash, the other
            half is judged; `split:NAME`, another split; or `same`, the judged images themselves.
        calibration_images: Fit on only this many of them, an even share of every unit.

    Attributes:
        todo: Units that the next loaders read, in this order; None for all. `continue_after` sets it.
        fits: Whether something must be fitted before images are judged; `split_off` sets it.
        calibrating: Whether the data are now those that calibrate; `setup` sets it by the stage.
        rows_together: Groups of so many neighbouring rows of a unit are judged in one batch; `keep_together` sets it.

    Raises:
        UsageError: An option is out of its range.
    """

    trains = False  # whether the model is made from these data, so that any order of their classes is right

    def __init__(
        self,
        path: str = "digits",
        name: str | None = None,
        split: str = "",
        revision: str | None = None,
        image_column: str = "image",
        label_column: str = "label",
        class_map: str | None = None,
        restrict_classes: bool = True,
        max_images: int | None = None,
        on_bad_image: Literal["error", "skip", "wrong"] = "error",
        batch_size: int = 32,
        num_workers: int | None = None,
        unit: UnitRule = "auto",
        calibration: str | None = None,
        calibration_images: int | None = None,
    ) -> None:
        super().__init__()
        self.prepare_data_per_node = False  # it looks and stores nothing; `setup` opens the data on every machine
        _at_least(1, "max_images", max_images)
        _at_least(1, "batch_size", batch_size)
        _at_least(0, "num_workers", num_workers)
        _at_least(1, "calibration_images", calibration_images)
        if not path:
            raise UsageError("--data.path must name a dataset: digits, a hub id, a folder or a file, got nothing")

        self._request = Request(path, name, split, revision, image_column, label_column, unit, max_images is not None)
        self._map: ClassMap | None = read_class_map(class_map) if class_map is not None else None
        self._restrict = restrict_classes
        self.max_images = max_images
        self.on_bad_image = on_bad_image
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.todo: Sequence[int] | None = None

        self.calibration = None if calibration is None else CalibrationRows.read(calibration)
        self.calibration_images = calibration_images
        self.fits = self.calibrating = False
        self.rows_together = 1
        self._fitted_on: Mapping[str, Any] | None = None
        self._left_out: frozenset[int] = frozenset()  # classes that a fitted classifier does not know

        self._source: Source | None = None
        self._other_split: Source | None = None  # the one that calibrates
        self._data: FittedData | None = None
        self._calibration: FittedData | None = None
        self._checked = False

    def split_off(self, fits: bool, fitted_on: Mapping[str, Any] | None = None) -> None:
        """Say what must be kept apart; call it before the data are opened.

        An option `calibration` of the user's holds in any case, so that what needs no fitting can be judged on the same
        images as what does.

        Args:
            fits: Whether something is fitted in this run; by default one half of the images calibrates then.
            fitted_on: The identity of the data that given constants were fitted on: these images are not judged.

        Raises:
            UsageError: Nothing is to be fitted, and an option says on how many images.
        """
        if fitted_on is not None and self.calibration_images is not None:
            raise UsageError(
                "--data.calibration_images is for constants that are fitted now, and --calibration-file gives them: "
                f"leave one of the two out, got {self.calibration_images:,}"
            )
        self.fits, self._fitted_on = fits, fitted_on
        if fits and self.calibration is None:
            self.calibration = CalibrationRows("half")
        apart = self.calibration is not None or fitted_on is not None
        if apart and not self._request.sizes:
            self._request = replace(self._request, sizes=True)
            self._source = self._other_split = None

    def without_labels(self) -> None:
        """Read no labels: nothing classifies. Call it before the data are opened.

        Raises:
            UsageError: An option is about labels.
        """
        if self._map is not None:
            raise UsageError(
                "--data.class_map says which class a label is, and --model.classifier none reads no labels: leave one "
                f"of the two out, got {self._map.origin}"
            )
        if self.on_bad_image == "wrong":
            raise UsageError(
                "--data.on_bad_image wrong counts images as wrong answers, and --model.classifier none has no answers: "
                "choose skip or error, got wrong"
            )
        if self._request.labelled:
            self._request = replace(self._request, labelled=False)
            self._source = self._other_split = None

    def keep_together(self, rows: int) -> None:
        """Judge groups of so many neighbouring rows of a unit in one batch; call it before the data are bound.

        A single row left over at a unit's end joins the batch before, which has one row more then.

        Raises:
            UsageError: Batches do not hold whole groups.
        """
        if self.batch_size % rows:
            raise UsageError(
                f"resampled heads come from images of the same batch, in groups of {rows} neighbouring rows: choose a "
                f"--data.batch_size that is a multiple of {rows}, got {self.batch_size}"
            )
        self.rows_together = rows

    def leave_out(self, classes: Sequence[int]) -> None:
        """Use no image of classes that a fitted classifier does not know; call it before the data are bound again.

        Args:
            classes: Those without a calibration image; none at first, which forgets those of an earlier classifier.

        Raises:
            UsageError: Images that cannot be used are not to be skipped, or fewer than two classes are left.
        """
        self._left_out = frozenset()
        if not classes:
            return
        from headprobe.data.labels.own_classes import refuse_unseen  # here: few runs need it

        present = range(self.classes) if self.valid_classes is None else self.valid_classes
        refuse_unseen(classes, present, self.class_names, self.on_bad_image == "skip")
        self._left_out = frozenset(classes)

    def prepare_data(self) -> None:
        """Open the dataset and read its first images, in one process, so that one clear error is shown and not many.

        Raises:
            UsageError: The dataset is not there, not accessible, or not usable with these options.
            RunError: It cannot be reached or read.
        """
        if self._checked:  # our command line calls this before Lightning does
            return
        source = self._open()
        labels = self._first_labels if self._request.labelled else []
        if labels and all(label == -1 for label in labels):
            raise UsageError(
                f"{self._request.shown} has no labels in this split (all are -1): choose another --data.split, or "
                f"--model.classifier none, which needs none, got {source.identity['split']}"
            )
        self._checked = True

    def setup(self, stage: str) -> None:
        """Fit the dataset to the trainer's model.

        Raises:
            UsageError: The dataset's classes cannot be matched to the model's.
            RunError: The dataset cannot be reached or read.
        """
        trainer = self.trainer
        if trainer is not None:
            module: Any = trainer.lightning_module
            # Another machine may lack the data: all processes must fail then, or the others would wait for it silently.
            self.calibrating = stage == "validate"
            on_all(trainer, lambda: self.bind_to(module))

    def bind_to(self, module: Any) -> None:
        """Fit the dataset to a module, and a classifier that is fitted on the data's own classes to the dataset.

        Args:
            module: A HeadProbe, or what has its `data_config` and `num_classes`.

        Raises:
            UsageError: The dataset's classes cannot be matched to the model's.
            RunError: The dataset cannot be reached or read.
        """
        names = getattr(module, "class_names", None)
        if not getattr(module, "takes_classes", False):
            self.bind(module.data_config, module.num_classes, names)
            if self._map is not None and getattr(module, "classifying", None) is not None:
                from headprobe.data.labels.own_classes import refuse_other_map  # here: few runs need it

                source, fitted = self._open(), module.classifying.choice.fitted
                refuse_other_map(self._judged, source, names or (), self._map, fitted, self._fitted_on or {})
            return
        self.bind(module.data_config, module.classes_asked, None, own_classes=True)
        module.take_classes(self.classes, self.class_names)

    def bind(
        self,
        data_config: Mapping[str, Any],
        num_classes: int | None,
        class_names: Sequence[str] | None = None,
        own_classes: bool = False,
    ) -> None:
        """Fit the dataset to a model.

        `setup` does this with the trainer's model; call it yourself to use the data without a trainer.

        Args:
            data_config: The model's evaluation transform, as timm's `resolve_model_data_config` returns it.
            num_classes: Classes of the model; 0 where nothing classifies, and labels are not read; None where the
                classes are the dataset's own, and it says their number.
            class_names: Names of the model's classes ("" for one without), None where it does not name them.
            own_classes: Whether the classes are the dataset's own, perhaps joined by the class map.

        Raises:
            UsageError: The dataset's classes cannot be matched to the model's.
            RunError: The dataset cannot be reached or read.
        """
        if num_classes == 0:
            self.without_labels()
        source = self._open()
        numbering = self._numbered(source, num_classes, class_names, own_classes)
        if numbering.by_name:
            check_texts(self._first_labels, numbering)
        reader = ImageReader(data_config)
        data = FittedData(source, reader, numbering, self.max_images, self.batch_size)
        self._data = replace(data, together=self.rows_together)
        valid = numbering.valid_classes if self._restrict else None  # the property needs the rows that are cut below
        if 1 in (numbering.classes, len(valid or ())):
            raise UsageError(
                "there is only one class to choose among, so every image would count as right: give --data.path images "
                "of several classes, or --data.restrict_classes false to choose among all "
                f"{numbering.classes} of the model, got {some(source.labels.names or ()) or self._request.shown}"
            )
        rows = self.calibration
        if self._fitted_on is not None:
            rows = rows_apart(self._fitted_on, source.identity, rows)
        self.calibration = rows
        if rows is not None:
            self._cut(self._data, rows)
        if self.rows_together > 1:
            _refuse_lonely(self._data)

    def _cut(self, data: FittedData, rows: CalibrationRows) -> None:
        """Set apart the images that calibrate and those that are judged."""
        # constants that were given need no images, only a rule that leaves theirs out
        self._calibration = self._calibration_of(data, rows) if self._fitted_on is None else None
        self._data = judged_part(data, rows)

    def _calibration_of(self, data: FittedData, rows: CalibrationRows) -> FittedData:
        """Return the data that calibrate: some of the data, or another split."""
        if rows.rule == "split":
            data = self._of_split(data, rows)
        return calibrating_part(data, rows, self.calibration_images)

    def _of_split(self, judged: FittedData, rows: CalibrationRows) -> FittedData:
        """Return the data of another split, with the classes of the judged ones: they are the model's."""
        if rows.split == judged.source.identity["split"]:
            raise UsageError(
                f"--data.calibration names the split that is judged: choose another one, or same, got {rows.text}"
            )
        if self._other_split is None:  # each stage and round binds the data again
            self._other_split = open_source(replace(self._request, split=rows.split))
        columns = judged.source.labels, self._other_split.labels
        numbering = of_other_split(judged.numbering, *columns, self._map, self._restrict)
        return replace(judged, source=self._other_split, max_images=None, numbering=numbering)

    def _numbered(
        self, source: Source, num_classes: int | None, class_names: Sequence[str] | None, own_classes: bool
    ) -> Numbering:
        """Return which class of the model each class of the dataset is, and which of them are left out."""
        if own_classes:
            from headprobe.data.labels.own_classes import number_own  # here: few runs need it

            found = number_own(source.labels, self._map, num_classes)
        elif num_classes is None:
            raise UsageError("only the dataset's own classes need no number, got none for the model's")
        else:
            found = number_labels(source.labels, num_classes, self._map, class_names, self.trains)
        return replace(found, left_out=self._left_out) if self._left_out else found

    @property
    def classes(self) -> int:
        """Number of classes, in the model's numbering."""
        return self._fitted.numbering.classes

    @property
    def class_names(self) -> list[str] | None:
        """The dataset's name of each model class ("" where it has none); None if the dataset names no classes."""
        return self._fitted.numbering.names

    @property
    def valid_classes(self) -> list[int] | None:
        """Sorted model classes to choose among; None for all (the dataset has them all, or no restriction is wanted).

        Scoring ImageNet-A or -R, of 200 classes, with a model of 1000 among these 200 is their authors' protocol, and
        `--valid-labels` of timm's validate.py.
        """
        valid = self._judged.valid_classes if self._restrict or self._left_out else None
        if not self._left_out:
            return valid
        return [number for number in valid or range(self.classes) if number not in self._left_out]

    @property
    def units(self) -> int:
        """Number of units; they are numbered from 0."""
        return self._fitted.source.units

    @property
    def unit_sizes(self) -> list[int] | None:
        """Images that each unit gives (after `max_images`), good and bad; None where only reading would show them."""
        return self._fitted.unit_sizes

    @property
    def unit_rows(self) -> list[Sequence[int]] | None:
        """Numbers of the rows that each unit gives, good and bad; None where only reading would show them."""
        return self._fitted.expected_rows

    @property
    def expected_images(self) -> int | None:
        """Images that all units give (after `max_images`), good and bad; None where only reading would show them."""
        return self._fitted.images

    @property
    def calibration_expected(self) -> int | None:
        """Images that calibrate, good and bad; None where nothing does, or where only reading would show them."""
        return None if self._calibration is None else self._calibration.images

    def calibrates_on(self, processes: int) -> tuple[int | None, int, int]:
        """Return how many images calibrate (None: nobody knows), units of a process, and how many it reads at once.

        Raises:
            RunError: Nothing calibrates, or the data are not bound.
        """
        before, self.calibrating = self.calibrating, True
        try:
            return self.expected_images, -(-self.units // processes), max(1, self._workers(processes))
        finally:
            self.calibrating = before

    @property
    def images_to_do(self) -> int | None:
        """Images of the units in `todo`, good and bad; None where only reading would show them."""
        sizes = self.unit_sizes
        if self.todo is None or len(self.todo) == self.units:
            return self.expected_images
        return sum(sizes[unit] for unit in self.todo) if sizes is not None else None

    def continue_after(self, finished: FinishedUnits | None) -> None:
        """Let the next loaders read only the units that are not finished; None lets them read all.

        Call it when the data are bound to a model.
        """
        self.todo = None if finished is None else [unit for unit in range(self.units) if unit not in finished.rows]

    def identity(self) -> dict[str, Any]:
        """Return what identifies the images and labels of this run, as JSON values: equal means the same numbers.

        Local files are known by name and size, Parquet also by footer and labels, wherever they lie. Images in folders
        are known by time and number on their disk too: others may have their names and sizes.
        """
        data = self._fitted
        local = is_local(self._request.path)
        part = None if self.calibration is None else {"rule": self.calibration.text, "calibrates": self.calibrating}
        if part is not None and self.calibrating:
            part["most_images"] = self.calibration_images
        return {
            "path": local_name(self._request.path) if local else self._request.path,
            "local": local,
            "name": self._request.name,
            **data.source.identity,
            "image_column": self._request.image_column,
            "label_column": self._request.label_column if self._request.labelled else None,
            "class_map": self._map.digest if self._map else None,
            "classes_sha256": data.numbering.digest,
            "restrict_classes": self._restrict,
            "chosen_among": self.classes if self.valid_classes is None else len(self.valid_classes),
            "transform": data.reader.text,
            "max_images": self.max_images,
            "units": self.units,
            "images": self.expected_images,
            "rows": part,
        }

    def decisions(self) -> list[Decision]:
        """Return what was decided about the images and labels where the user did not."""
        data = self._fitted
        found = [*data.source.decisions]
        if split := data.source.identity["split"]:
            found.append(Decision("split", f"{split} (--data.split)"))
        given = (self._request.image_column, self._request.label_column)
        if given != ("image", "label"):
            labels = f", labels in {given[1]}" if self._request.labelled else ""
            found.append(Decision("columns", f"images in {given[0]}{labels}"))
        found.append(Decision("classes", data.numbering.matched, data.numbering.doubtful))
        valid = self._judged.valid_classes if self._restrict else None  # those left out are the classifier's to say
        if valid is not None:
            found.append(Decision("restricted classes", restricted(valid, self.classes), shown=True))
        if self.calibration is not None or self._fitted_on is not None:
            found += self._parts_in_words()
        if self._calibration is not None and (strangers := self._calibration.numbering.strangers):
            names = self._calibration.source.labels.names or ()
            text = (
                f"{some([names[number] for number in sorted(strangers)])}: {counted(len(strangers), 'class')} of the "
                "split that calibrates and not of the judged one; their images count as unlabelled there"
            )
            found.append(Decision("calibration classes", text, shown=True))
        if self.max_images is not None:
            found.append(Decision("images", data.shares_in_words, shown=not data.spreads))
        found.append(Decision("transform", " ".join(data.reader.text.split())))
        return found

    def _parts_in_words(self) -> list[Decision]:
        """Return which images choose and which judge; nothing where all are judged and nothing is fitted."""
        judged = None if self._data is None else self._data.images
        fit = None if self._calibration is None else self._calibration.images
        words = parts_in_words(self.calibration, self._fitted_on, self.fits, judged, fit)
        return [Decision("calibration", words, shown=True)] if words else []

    def stream(self, process: int = 0, processes: int = 1) -> UnitStream:
        """Return the batches of one process of several, read in this process; `todo` chooses the units.

        Raises:
            UsageError: `todo` names a unit that is not there.
        """
        return self._fitted.stream(self.todo, process, processes)

    def val_dataloader(self) -> "DataLoader[ImageBatch]":
        """Return the loader of this process's units of the data that calibrate."""
        return self.test_dataloader()

    def test_dataloader(self) -> "DataLoader[ImageBatch]":
        """Return the loader of this process's units."""
        trainer = self.trainer
        process, processes = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        stream = self.stream(process, processes)
        return DataLoader(stream, batch_size=None, num_workers=self._workers(processes), pin_memory=self._on_gpu())

    def _open(self) -> Source:
        if self._source is None:
            self._source = open_source(self._request)
        return self._source

    @cached_property
    def _first_labels(self) -> list[Any]:
        """Labels of the first rows; on the hub they take a request."""
        return first_labels(self._open())

    @property
    def _fitted(self) -> FittedData:
        data = self._calibration if self.calibrating else self._data
        if data is None:
            raise RunError("the data module is not set up yet: call bind(data_config, num_classes), or use a Trainer")
        return data

    @property
    def _judged(self) -> Numbering:
        """The judged images' numbering, while others calibrate too: their split may have fewer classes."""
        return (self._data or self._fitted).numbering

    def _workers(self, processes: int) -> int:
        if self.num_workers is not None:
            return self.num_workers
        local_processes = self.trainer.num_devices if self.trainer is not None else 1
        return default_workers(self.units, self.expected_images, processes, local_processes)

    def _on_gpu(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"


def _at_least(least: int, option: str, value: int | None) -> None:
    if value is not None and value < least:
        raise UsageError(f"--data.{option} must be at least {least}, got {value}")


def _refuse_lonely(data: FittedData) -> None:
    """Refuse a unit that gives one row, which has no neighbour; where sizes are unknown, reading it shows that."""
    for unit, size in enumerate(data.unit_sizes or () if data.source.unit_sizes is not None else ()):
        if size == 1:
            raise RunError(
                "resampled heads come from another image of the same unit of the data, and "
                f"{data.source.unit_name(unit)} gives one row only: take more images (--data.max_images), larger units "
                "(--data.unit file), or leave resample out, got 1 row"
            )
