"""`--records`: one row per image and mask, from which `masks.csv` can be counted again."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

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
