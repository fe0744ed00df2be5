"""A new statistic is a metric, a description and a callback; everything else comes by itself."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from headprobe.backbone.capture.layer_record import LayerRecord
from headprobe.backbone.capture.taps import Tap, tapping
from headprobe.data.datamodule import ImageNetDataModule
from headprobe.module import HeadProbe
from tests.callbacks.test_resume import broken_off
from tests.cli_runs import Ended, command
from tests.forked import digits

pytestmark = pytest.mark.usefixtures("no_arguments")

HEADS = 24  # of digits_vit: 6 layers of 4
IMAGES, UNITS = 40, 5


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """A command that names the statistic by its import path, on its own copy of some digits."""
    folder = tmp_path_factory.mktemp("toy")
    digits(folder / "set", IMAGES, UNITS)
    callback = {"class_path": "tests.callbacks.toy_statistic.HeadOutputSize", "init_args": {"power": 2.0}}
    (folder / "toy.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    given = ("test", "--config", str(folder / "toy.yaml"), "--data.path", str(folder / "set"))
    return (*given, "--mask-spec", "layer:3", "--data.num_workers", "0", "--trainer.accelerator", "cpu")


@pytest.fixture(scope="module")
def run(words: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Ended:
    ended = command(tmp_path_factory.mktemp("run"), *words)
    assert ended.code == 0, ended.err
    return ended


def rows(ended: Ended, name: str, version: int = 0) -> list[dict[str, str]]:
    with (ended.directory(version) / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_its_column_is_in_heads_csv_for_both_models_and_their_change(run: Ended) -> None:
    table, change = rows(run, "heads.csv"), rows(run, "heads_change.csv")
    assert list(table[0]) == ["mask", "layer", "head", "images", "output_size"]
    for baseline, masked, difference in zip(table[:HEADS], table[HEADS:], change, strict=True):
        expected = float(masked["output_size"]) - float(baseline["output_size"])
        assert float(difference["output_size"]) == pytest.approx(expected)
    assert {row["output_size"] for row in table[HEADS:] if row["layer"] == "3"} == {"0.0"}


def test_its_numbers_are_what_a_plain_forward_pass_gives(run: Ended, words: tuple[str, ...]) -> None:
    probe, data = HeadProbe().eval(), ImageNetDataModule(words[4], num_workers=0)
    data.prepare_data()
    data.bind(probe.data_config, probe.num_classes)
    data.setup("test")
    images = torch.cat([batch.images for batch in data.test_dataloader()])
    found: list[LayerRecord] = []
    with torch.inference_mode(), tapping(probe.backbone, probe.layout, [Tap(found.append)]):
        probe.backbone(probe.normalised(images))
    expected = np.concatenate([record.heads_out.square().mean(dim=(0, 1, 3)).numpy() for record in found])
    written = [float(row["output_size"]) for row in rows(run, "heads.csv")[:HEADS]]
    np.testing.assert_allclose(written, expected, rtol=1e-5)


def test_its_further_table_is_written(run: Ended) -> None:
    assert rows(run, "output_size.csv") == [{"layer": "0", "largest": "0.5"}, {"layer": "1", "largest": ""}]


def test_it_has_figures_by_its_columns_name(run: Ended) -> None:
    drawn = {file.name for file in (run.directory() / "figures").iterdir()}
    assert drawn == {"output_size_by_layer.png", "output_size_change.png"}


def test_it_has_curves_histograms_and_images_in_tensorboard(run: Ended) -> None:
    events = EventAccumulator(str(run.directory()), size_guidance={"images": 0, "scalars": 0}).Reload()
    curve = events.Scalars("output_size_masked/head_02")
    table = [row for row in rows(run, "heads.csv") if row["mask"] == "layer:3" and row["head"] == "2"]
    np.testing.assert_allclose(
        [point.value for point in curve], [float(row["output_size"]) for row in table], rtol=1e-6
    )
    assert {"output_size", "output_size_masked", "output_size_change"} <= set(events.Tags()["histograms"])
    assert {"output_size/by_layer", "output_size/change"} == set(events.Tags()["images"])


def test_its_options_are_in_the_record_and_its_summary_on_the_terminal(run: Ended) -> None:
    record = json.loads((run.directory() / "run.json").read_text())
    assert {"name": "output_size", "power": 2.0} in record["statistics"]
    assert "Output size: over all tokens" in run.out
    assert "5.250" in run.out


def test_a_run_that_broke_goes_on_with_its_sums_to_the_last_bit(
    run: Ended, words: tuple[str, ...], tmp_path: Path
) -> None:
    broken_off(tmp_path, 3, *words)
    ended = command(tmp_path, *words)
    assert ended.code == 0, ended.err
    assert json.loads((ended.directory(1) / "run.json").read_text())["units_resumed"] == 3
    for name in ("heads.csv", "heads_change.csv"):
        assert (ended.directory(1) / name).read_bytes() == (run.directory() / name).read_bytes()
