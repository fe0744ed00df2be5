"""The same command again: what was finished is not scored again, and what is not the same is not mixed."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import pytest
import timm
import torch

from headprobe.backbone.growing.growing_pass import GrowingPass
from headprobe.backbone.weights import ModelSource, create_backbone, save_backbone
from headprobe.callbacks.resume import Resume
from headprobe.data.datamodule import ImageNetDataModule
from headprobe.errors import RunError
from headprobe.masks.spec import MaskSpec
from headprobe.module import HeadProbe
from tests.cli_runs import Ended, command, only_message
from tests.forked import DIGITS, digits, run

pytestmark = pytest.mark.usefixtures("no_pictures")

TEST = ("test", "--mask-spec", "each:layer", "--data.path", "set", "--data.num_workers", "0")
RUN = (*TEST, "--trainer.accelerator", "cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    digits(tmp_path / "set", 40, 5)
    return tmp_path


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("expected")
    digits(folder / "set", 40, 5)
    ended = command(folder, *RUN)
    assert ended.code == 0, ended.err
    return (ended.directory() / "masks.csv").read_bytes()


def broken_off(folder: Path, batches: int, *words: str, stage: str = "test_step") -> Ended:
    """Run a command that fails after some batches of a stage: those that are judged, or that calibrate."""
    real = getattr(HeadProbe, stage)
    seen: list[int] = []

    def step(self: HeadProbe, batch: Any, batch_idx: int) -> Any:
        if len(seen) == batches:
            raise RunError("the machine went away")
        seen.append(batch_idx)
        return real(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeadProbe, stage, step)
        ended = command(folder, *(words or RUN))
    assert ended.code == 1
    assert only_message(ended) == "the machine went away\n"
    return ended


def counted_batches(folder: Path, *words: str) -> tuple[Ended, int]:
    """Run a command and count its batches."""
    real = HeadProbe.test_step
    seen: list[int] = []

    def step(self: HeadProbe, batch: Any, batch_idx: int) -> Any:
        seen.append(batch_idx)
        return real(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeadProbe, "test_step", step)
        return command(folder, *(words or RUN)), len(seen)


def record(ended: Ended, version: int) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((ended.directory(version) / "run.json").read_text())
    return content


def units(folder: Path) -> Path:
    (found,) = (folder / "lightning_logs" / "units").iterdir()
    return found


def test_the_same_command_goes_on_where_the_last_one_stopped(folder: Path, expected: bytes) -> None:
    broken_off(folder, 3)
    ended, batches = counted_batches(folder)
    assert (ended.code, batches) == (0, 2)
    assert "Resuming: 3 of 5 units (24 of 40 images) were scored before" in ended.out
    assert (ended.directory(1) / "masks.csv").read_bytes() == expected
    assert (record(ended, 0)["status"], record(ended, 1)["units_resumed"]) == ("failed", 3)
    assert [path.name for path in units(folder).glob("units-*")] == ["units-00000-00004.npz"]


def test_a_finished_run_is_added_up_again_and_not_scored(folder: Path, expected: bytes) -> None:
    command(folder, *RUN)
    ended, batches = counted_batches(folder)
    assert (ended.code, batches) == (0, 0)
    assert (ended.directory(1) / "masks.csv").read_bytes() == expected


def test_never_scores_everything_again(folder: Path, expected: bytes) -> None:
    command(folder, *RUN)
    ended, batches = counted_batches(folder, *RUN, "--resume", "never")
    assert (ended.code, batches) == (0, 5)
    assert (ended.directory(1) / "masks.csv").read_bytes() == expected


OTHERS = [
    ("--mask-spec", "each:index"),
    ("--mask-spec", "layer:0"),
    ("--data.max_images", "39"),
    ("--data.batch_size", "31"),
    ("--model.row_budget", "40"),
    ("--model.per_class", "true"),
    ("--records",),
    ("--trainer.callbacks", "HeadSpectrum"),
    ("--trainer.precision", "bf16-mixed"),
]


@pytest.mark.parametrize("other", OTHERS, ids=[" ".join(words) for words in OTHERS])
def test_what_changes_numbers_begins_anew(folder: Path, other: tuple[str, ...]) -> None:
    broken_off(folder, 3)
    words = tuple(word for word in RUN if other[0] != "--mask-spec" or word not in ("--mask-spec", "each:layer"))
    ended, batches = counted_batches(folder, *words, *other)
    assert (ended.code, batches) == (0, 5), ended.err
    assert record(ended, 1)["units_resumed"] == 0


def test_another_numbering_of_the_same_images_begins_anew(tmp_path: Path) -> None:
    for number in range(9):
        (tmp_path / "set" / f"c{number}").mkdir(parents=True)
        write_digit(tmp_path / "set" / f"c{number}" / "a.png", number)
    (tmp_path / "set" / "c9").mkdir()
    words = ("test", "--data.path", "set", "--data.num_workers", "0", "--trainer.accelerator", "cpu")
    first = command(tmp_path, *words)
    (tmp_path / "set" / "c9").rmdir()
    (tmp_path / "set" / "a_first_class").mkdir()
    again = command(tmp_path, *words)
    assert (first.code, again.code) == (0, 0), again.err
    assert (record(again, 1)["units_resumed"], record(again, 0)["key"] == record(again, 1)["key"]) == (0, False)
    assert again.rows(0)[0]["top1_count"] != again.rows(1)[0]["top1_count"]


def write_digit(path: Path, label: int) -> None:
    """Write the first bundled image of a class."""
    import pyarrow.parquet as pq

    table = pq.read_table(DIGITS / "test.parquet")
    path.write_bytes(table.column("image")[table.column("label").to_pylist().index(label)].as_py()["bytes"])


def test_labels_changed_in_place_begin_anew(folder: Path) -> None:
    import pyarrow.parquet as pq

    command(folder, *RUN)
    path = folder / "set" / "validation-00001-of-00005.parquet"
    table, size = pq.read_table(path), path.stat().st_size
    labels = table.column("label").to_pylist()
    labels = [*labels[1:], labels[0]]
    place = table.schema.get_field_index("label")
    pq.write_table(table.set_column(place, table.schema.field("label"), [labels]), path)
    assert path.stat().st_size == size
    assert record(command(folder, *RUN), 1)["units_resumed"] == 0


def test_options_saved_with_the_weights_are_part_of_the_key(folder: Path) -> None:
    source = ModelSource("test_vit", pretrained=False, num_classes=10)
    backbone = create_backbone(source)
    for name, options in (("a", {}), ("b", {"act_layer": "relu"})):
        save_backbone(backbone, folder / f"{name}.safetensors", replace(source, options=options))
    words = ("--model.name", "test_vit", "--data.class_map", "identity", "--model.weights")
    for version, name in enumerate(("a", "b")):
        ended = command(folder, *RUN, *words, f"{name}.safetensors")
        assert ended.code == 0, ended.err
        assert record(ended, version)["units_resumed"] == 0
    assert ended.rows(0)[0]["nll"] != ended.rows(1)[0]["nll"]


def test_unfused_attention_begins_anew(folder: Path) -> None:
    broken_off(folder, 3)
    timm.layers.set_fused_attn(enable=False)
    try:
        assert record(command(folder, *RUN), 1)["units_resumed"] == 0
    finally:
        timm.layers.set_fused_attn(enable=True)


def test_other_code_of_the_same_version_begins_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_off(folder, 3)
    monkeypatch.setattr("headprobe.callbacks.identity.source_digest", lambda: "0" * 12)
    assert record(command(folder, *RUN), 1)["units_resumed"] == 0


def test_the_place_of_the_data_and_the_order_of_callbacks_do_not_matter(folder: Path) -> None:
    both = ("--trainer.callbacks", "HeadAttention", "--trainer.callbacks+", "HeadSpectrum")
    swapped = ("--trainer.callbacks", "HeadSpectrum", "--trainer.callbacks+", "HeadAttention")
    broken_off(folder, 3, *RUN, *both)
    (folder / "set").rename(folder / "moved")
    words = tuple("moved" if word == "set" else word for word in RUN)
    assert record(command(folder, *words, *swapped), 1)["units_resumed"] == 3


def test_what_is_made_of_the_same_moments_goes_on(folder: Path) -> None:
    (folder / "similar.yaml").write_text(
        "trainer: {callbacks: [{class_path: HeadSimilarity, init_args: {variance: 0.9, measures: [cka]}}]}\n"
    )
    broken_off(folder, 3, *RUN, "--trainer.callbacks", "HeadSimilarity")
    ended = command(folder, "test", "--config", "similar.yaml", *RUN[1:])
    assert ended.code == 0, ended.err
    assert record(ended, 1)["units_resumed"] == 3


def test_a_test_without_a_store_scores_all_after_one_that_resumed(folder: Path) -> None:
    broken_off(folder, 3)
    data = ImageNetDataModule(str(folder / "set"), num_workers=0)
    options: dict[str, Any] = {"accelerator": "cpu", "default_root_dir": folder, "enable_progress_bar": False}
    several: list[list[lightning.Callback]] = [[Resume()], []]
    for callbacks in several:
        probe = HeadProbe()
        probe.choose_masks([MaskSpec("each:layer")])
        lightning.Trainer(callbacks=callbacks, logger=False, **options).test(probe, datamodule=data, verbose=False)
        assert probe.scores is not None
        assert probe.scores.images[0] == 40
        assert data.todo is None


def test_sums_of_an_earlier_test_never_come_into_another_store(folder: Path) -> None:
    class Fails(lightning.Callback):
        def on_test_start(self, *args: Any) -> None:
            raise RunError("too early")

    options: dict[str, Any] = {"accelerator": "cpu", "default_root_dir": folder, "enable_progress_bar": False}
    probe = HeadProbe()
    probe.choose_masks([MaskSpec("layer:0")])
    digits(folder / "other", 30, 5)
    resume = Resume()
    first, second = (ImageNetDataModule(str(folder / name), num_workers=0) for name in ("set", "other"))
    lightning.Trainer(callbacks=[resume], logger=False, **options).test(probe, datamodule=first, verbose=False)
    with pytest.raises(RunError, match="too early"):
        lightning.Trainer(callbacks=[resume, Fails()], logger=False, **options).test(probe, datamodule=second)
    stored = list((folder / "lightning_logs" / "units").glob("*/units-*"))
    assert len(stored) == 1


def test_masks_in_another_order_are_another_run(folder: Path) -> None:
    for name, specs in (("one", "[layer:0, layer:1]"), ("two", "[layer:1, layer:0]")):
        (folder / f"{name}.yaml").write_text(f"mask_spec: {specs}\n")
    rest = RUN[3:]
    first = command(folder, "test", "--config", "one.yaml", *rest)
    ended = command(folder, "test", "--config", "two.yaml", *rest)
    assert record(ended, 1)["units_resumed"] == 0
    before, after = ({row["mask"]: row for row in ended.rows(version)} for version in (0, 1))
    assert first.code == ended.code == 0
    assert before["layer:0"]["top1_count"] == after["layer:0"]["top1_count"]


@pytest.mark.parametrize("same", [("--data.num_workers", "1"), ("--data.on_bad_image", "skip"), ("--resume", "auto")])
def test_what_changes_no_number_goes_on(folder: Path, same: tuple[str, ...]) -> None:
    broken_off(folder, 3)
    ended = command(folder, *RUN, *same)
    assert record(ended, 1)["units_resumed"] == 3


@pytest.mark.parametrize("place", ["units", "run"])
def test_units_of_another_place_can_be_named(folder: Path, tmp_path: Path, expected: bytes, place: str) -> None:
    broken_off(folder, 3)
    path = units(folder) if place == "units" else folder / "lightning_logs" / "version_0"
    elsewhere = ("--trainer.default_root_dir", str(tmp_path / "elsewhere"))
    ended = command(folder, *RUN, *elsewhere, "--resume", str(path))
    assert ended.code == 0, ended.err
    results = tmp_path / "elsewhere" / "lightning_logs" / "version_0"
    assert json.loads((results / "run.json").read_text())["units_resumed"] == 3
    assert (results / "masks.csv").read_bytes() == expected


def test_named_units_of_another_run_are_refused_with_what_differs(folder: Path) -> None:
    broken_off(folder, 3)
    ended = command(folder, *RUN, "--data.max_images", "20", "--resume", str(units(folder)))
    assert ended.code == 2
    message = only_message(ended)
    assert "data.max_images: 20 here, null there" in message
    assert "whose numbers must not be mixed" in message


def test_records_without_a_logger_are_found_where_they_are(folder: Path) -> None:
    for number in range(2):
        ended = command(folder, *RUN, "--records", "--trainer.logger", "false")
        assert ended.code == 0, ended.err
        assert len(list((ended.directory(number) / "records").glob("*.parquet"))) == 5


@pytest.mark.parametrize("value", ["null", "true", "3", "[a]", "''"])
def test_a_config_file_that_resumes_nonsense_is_one_message(folder: Path, value: str) -> None:
    (folder / "run.yaml").write_text(f"resume: {value}\n")
    ended = command(folder, "test", "--config", "run.yaml", *RUN[1:])
    assert ended.code == 2
    assert "resume" in only_message(ended)


@pytest.mark.parametrize("words", [("--resume", "nowhere"), ("--resume", "set")])
def test_a_path_without_units_is_refused(folder: Path, words: tuple[str, ...]) -> None:
    ended = command(folder, *RUN, *words)
    assert ended.code == 2
    assert f"got '{words[1]}'" in only_message(ended)


def test_a_broken_unit_is_named_and_scored_again_when_deleted(folder: Path, expected: bytes) -> None:
    broken_off(folder, 3)
    file = units(folder) / "units-00000-00001.npz"
    file.write_bytes(file.read_bytes()[:100])
    ended = command(folder, *RUN)
    assert ended.code == 1
    assert "units-00000-00001.npz" in only_message(ended)
    file.unlink()
    again, batches = counted_batches(folder)
    assert (again.code, batches) == (0, 4)
    assert (again.directory(1) / "masks.csv").read_bytes() == expected  # the refused run left no folder


def test_units_of_another_runs_arrays_are_named(folder: Path) -> None:
    second = ("test", "--mask-spec", "layer:1", *RUN[3:], "--model.per_class", "true")
    broken_off(folder, 3)
    broken_off(folder, 3, *second)
    one, other = sorted((folder / "lightning_logs" / "units").iterdir())
    (one / "units-00002-00002.npz").write_bytes((other / "units-00002-00002.npz").read_bytes())
    (other / "units-00002-00002.npz").write_bytes((one / "units-00000-00001.npz").read_bytes())
    for words in (RUN, second):
        ended = command(folder, *words)
        assert ended.code == 1
        assert "units-00002-00002.npz" in only_message(ended)


def test_rows_that_fitted_once_are_kept_when_going_on(folder: Path) -> None:
    real = GrowingPass.logits

    def scarce(self: GrowingPass, images: Any, plan: Any, taps: Any = ()) -> Any:
        if plan.most_rows > 30:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, images, plan, taps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GrowingPass, "logits", scarce)
        # its own line on the halved rows is no part of the message that is looked at
        patch.setattr("lightning.pytorch.utilities.rank_zero_warn", lambda *_, **__: None)
        broken_off(folder, 3)
    ended = command(folder, *RUN)
    assert ended.code == 0, ended.err
    found = record(ended, 1)
    assert found["row_plan"]["budget"] <= 30
    assert found["units_by_row_budget"] == {str(found["row_plan"]["budget"]): 5}
    assert found["row_budget"] == "usual"  # none was given, which is what the key is made of


def test_records_of_all_sessions_come_together(folder: Path) -> None:
    broken_off(folder, 3, *RUN, "--records")
    ended = command(folder, *RUN, "--records")
    assert ended.code == 0, ended.err
    files = sorted(path.name for path in (ended.directory(1) / "records").iterdir())
    assert files == [f"unit-{unit:05d}.parquet" for unit in range(5)]


def test_a_full_disk_is_one_message_and_the_next_run_goes_on(folder: Path, expected: bytes) -> None:
    wide = ("test", "--mask-spec", "each:head", *RUN[3:], "--model.per_class", "true")
    ended = run(folder, *wide, file_size=9000)
    assert ended.code == 1
    message = only_message(ended)
    assert "(File too large); make room" in message
    assert "units-" in message
    assert not list(units(folder).glob("units-*"))
    again = command(folder, *wide)
    assert again.code == 0, again.err
    assert again.rows(1)[0]["images"] == "40"


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_half_way_loses_nothing_that_was_stored(
    folder: Path, expected: bytes, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    real, step = os.fsync, HeadProbe.test_step
    steps: list[int] = []

    def fsync(descriptor: int) -> None:
        if len(steps) >= 4:
            raise OSError(number, os.strerror(number))
        real(descriptor)

    def test_step(self: HeadProbe, batch: Any, batch_idx: int) -> Any:
        steps.append(batch_idx)
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        patch.setattr(HeadProbe, "test_step", test_step)
        patch.setattr("headprobe.units.store.COST", 1e9)  # store after every unit
        ended = command(folder, *RUN)
    assert ended.code == 1
    message = only_message(ended)
    assert f"({os.strerror(number)}); make room" in message
    assert "run the same command again to resume" in message
    again = command(folder, *RUN)
    assert again.code == 0, again.err
    assert record(again, 1)["units_resumed"] == 3
    assert (again.directory(1) / "masks.csv").read_bytes() == expected


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to read-only directories")
def test_a_read_only_directory_is_one_message_and_the_next_run_goes_on(folder: Path, expected: bytes) -> None:
    broken_off(folder, 3)
    directory = units(folder)
    directory.chmod(0o500)
    ended = command(folder, *RUN)
    directory.chmod(0o700)
    assert ended.code == 1
    assert "cannot write" in only_message(ended)
    again = command(folder, *RUN)
    assert (again.directory(2) / "masks.csv").read_bytes() == expected


def test_units_that_cannot_be_written_are_one_message(folder: Path) -> None:
    (folder / "lightning_logs").mkdir()
    (folder / "lightning_logs" / "units").write_text("a file")
    ended = command(folder, *RUN)
    assert ended.code == 1
    assert "cannot write 'lightning_logs/units/" in only_message(ended)


def test_bad_images_are_accepted_afterwards_without_scoring_again(tmp_path: Path) -> None:
    write_bad(tmp_path)
    first = command(tmp_path, *RUN)
    assert first.code == 1
    assert "2 images could not be used" in only_message(first)
    skip, batches = counted_batches(tmp_path, *RUN, "--data.on_bad_image", "skip")
    assert (skip.code, batches) == (0, 0)
    assert "2 images could not be used and were skipped; all numbers are of the other 38" in " ".join(skip.out.split())
    wrong, batches = counted_batches(tmp_path, *RUN, "--data.on_bad_image", "wrong")
    assert (wrong.code, batches) == (0, 0)
    for version, images, ended in ((0, 38, first), (1, 38, skip), (2, 40, wrong)):
        rows = ended.rows(version)
        assert {row["images"] for row in rows} == {str(images)}
        assert [row["top1_count"] for row in rows] == [row["top1_count"] for row in first.rows(0)]
        assert [float(row["top1"]) for row in rows] == [int(row["top1_count"]) / images for row in rows]
        assert [row["nll"] for row in rows] == [row["nll"] for row in first.rows(0)]
        found = record(ended, version)
        assert found["bad_images"] == 2
        assert len((ended.directory(version) / "bad_images.csv").read_text().splitlines()) == 3
    assert [record(wrong, version)["status"] for version in range(3)] == ["failed", "done", "done"]


def write_bad(folder: Path) -> None:
    """Write the digits with two images that are none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    digits(folder / "set", 40, 5)
    for file, row in ((1, 3), (4, 0)):
        path = folder / "set" / f"validation-{file:05}-of-00005.parquet"
        table = pq.read_table(path)
        images = table.column("image").to_pylist()
        images[row] = {"bytes": b"no image", "path": "bad.png"}
        column = pa.array(images, type=table.schema.field("image").type)
        pq.write_table(
            table.set_column(table.schema.get_field_index("image"), table.schema.field("image"), column), path
        )
