"""`--records`: one row per image and mask, from which `masks.csv` can be counted again."""

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from headprobe import HeadProbe, ImageNetDataModule, ProbeTrainer
from tests.cli_runs import QUICK, Ended, command
from tests.data.parquet_sets import png, table, write_table


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    return command(tmp_path_factory.mktemp("records"), "test", *QUICK, "--mask-spec", "each:layer", "--records")


def records(ended: Ended) -> list[dict[str, object]]:
    files = sorted((ended.directory() / "records").iterdir())
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def test_there_is_one_file_for_each_unit(run: Ended) -> None:
    units = json.loads((run.directory() / "run.json").read_text())["data"]["units"]
    names = sorted(file.name for file in (run.directory() / "records").iterdir())
    assert names == [f"unit-{unit:05}.parquet" for unit in range(units)]


def test_every_image_stands_once_under_every_mask(run: Ended) -> None:
    rows = records(run)
    keys = {(row["unit"], row["row"], row["mask"]) for row in rows}
    assert len(keys) == len(rows) == 40 * 7


def test_counts_from_records_are_those_of_masks_csv(run: Ended) -> None:
    rows = records(run)
    right = {(row["unit"], row["row"]) for row in rows if row["mask"] == "none" and row["label"] == row["prediction"]}
    for expected in run.rows():
        mine = [row for row in rows if row["mask"] == expected["mask"]]
        hits = {(row["unit"], row["row"]) for row in mine if row["label"] == row["prediction"]}
        assert len(mine) == int(expected["images"])
        assert len(hits) == int(expected["top1_count"])
        assert len(right - hits) == int(expected["right_to_wrong"])
        assert len(hits - right) == int(expected["wrong_to_right"])
        assert sum(float(str(row["nll"])) for row in mine) / 40 == pytest.approx(float(expected["nll"]), rel=1e-5)


def test_the_margin_is_positive_exactly_where_the_prediction_is_right(run: Ended) -> None:
    assert all((float(str(row["margin"])) > 0) == (row["label"] == row["prediction"]) for row in records(run))


def test_labels_and_predictions_are_in_the_models_numbering(tmp_path: Path) -> None:
    # a data set of two classes, which the model knows as 7 and 3
    write_table(tmp_path / "set", table([png(n) for n in range(6)], [0, 1, 0, 1, 0, 1]))
    (tmp_path / "map.json").write_text(json.dumps([7, 3, 7, 3, 7, 3, 7, 3, 7, 3]))
    ended = command(
        tmp_path, "test", *QUICK, "--data.path", "set", "--data.class_map", "map.json", "--mask-spec", "layer:3",
        "--records",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    rows = records(ended)
    assert [row["label"] for row in rows if row["mask"] == "none"] == [7, 3, 7, 3, 7, 3]
    assert {row["prediction"] for row in rows} <= {3, 7}


def images(ended: Ended, version: int = 0) -> list[dict[str, object]]:
    return list(pq.read_table(ended.directory(version) / "images.parquet").to_pylist())


def test_images_parquet_leads_from_every_row_to_the_file_and_its_label(tmp_path: Path) -> None:
    for name in ("3", "8"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(70):
            (tmp_path / "set" / name / f"{number}.png").write_bytes(png(number + 100 * int(name)))
    (tmp_path / "set" / "8" / "broken.png").write_bytes(b"none")
    ended = command(
        tmp_path, "test", "--data.path", "set", "--data.class_map", "identity", "--mask-spec", "each:layer",
        "--records", "--data.on_bad_image", "skip", "--data.num_workers", "0", "--trainer.accelerator", "cpu",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    listed = images(ended)
    good = [row for row in listed if row["reason"] is None]
    (bad,) = [row for row in listed if row["reason"] is not None]
    assert (bad["source"], bad["label"]) == ("8/broken.png", None)
    assert sorted(str(row["source"]) for row in listed) == sorted(
        f"{file.parent.name}/{file.name}" for file in (tmp_path / "set").glob("*/*.png")
    )
    assert all(str(row["source"]).startswith(f"{row['label']}/") for row in good)

    source = {(row["unit"], row["row"]): row["source"] for row in listed}
    assert len(source) == len(listed) == 141
    rows = records(ended)
    assert all(row["source"] == source[row["unit"], row["row"]] for row in rows)
    assert {(row["unit"], row["row"]) for row in rows} == {(row["unit"], row["row"]) for row in good}


def test_a_row_of_a_parquet_file_is_the_row_of_its_group_also_with_max_images(run: Ended) -> None:
    shipped = pq.ParquetFile(str(resources.files("headprobe") / "data" / "digits" / "test.parquet"))
    listed = images(run)
    assert len(listed) == 40
    for row in listed:
        group = shipped.read_row_group(row["unit"], columns=["label"])
        assert group["label"][row["row"]].as_py() == row["label"]
        assert str(row["source"]).startswith(f"test.parquet row group {row['unit']}")
    assert {row["row"] for row in listed} != {*range(8)}  # not the first ones of each of the five groups


def test_images_of_units_that_were_scored_before_are_listed_once(tmp_path: Path) -> None:
    words = ("test", *QUICK, "--mask-spec", "layer:3", "--records")
    first = command(tmp_path, *words)
    again = command(tmp_path, *words)
    assert "scored before" in again.out
    assert images(again, 1) == images(first)


def test_counts_are_those_of_masks_csv_also_with_nan_and_infinite_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = HeadProbe.logits_of

    def broken(probe: HeadProbe, *arguments: Any) -> torch.Tensor:
        logits = plain(probe, *arguments).clone()
        logits[0, ::3, 3] = torch.nan
        logits[1, 1::3, 3] = torch.inf
        return logits

    monkeypatch.setattr(HeadProbe, "logits_of", broken)
    probe = HeadProbe()
    probe.choose_masks("layer:3")
    options: dict[str, Any] = {"default_root_dir": tmp_path, "accelerator": "cpu", "enable_progress_bar": False}
    ProbeTrainer(**options).test(probe, ImageNetDataModule(num_workers=0), records=True, verbose=False)

    ended = Ended(0, "", "", tmp_path)
    rows = records(ended)
    baseline = {(row["unit"], row["row"]): row for row in rows if row["mask"] == "none"}
    assert any(row["label"] == 3 and row["prediction"] is None for row in rows)
    for expected in ended.rows():
        mine = [row for row in rows if row["mask"] == expected["mask"]]
        right = [row for row in mine if row["prediction"] == row["label"]]
        assert len(right) == int(expected["top1_count"])
        assert sum(row["prediction"] is None for row in mine) == int(expected["nonfinite"]) > 100
        assert sum(float(str(row["margin"])) > 0 for row in mine) == len(right)
        agree = [
            row for row in mine if row["prediction"] == baseline[row["unit"], row["row"]]["prediction"] is not None
        ]
        assert len(agree) == round(500 * float(expected["agreement"]))
