"""Runs are read back without torch: tables by column, arrays, and where each mask is drawn."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headprobe.errors import RunError, UsageError
from headprobe.masks.spec import MaskSpec, expand_all
from headprobe.run.load import load_files
from headprobe.run.results import write_arrays, write_record
from tests.run.small_runs import HEADS, write_heads, write_run


def test_every_mask_has_its_heads_and_its_point_on_a_curve(tmp_path: Path) -> None:
    run = load_files(write_run(tmp_path, ["each:layer", "head:2.1"]))
    assert run.heads["head:2.1"] == [(2, 1)]
    assert run.heads["layer:2"] == [(2, 0), (2, 1), (2, 2)]
    assert (run.curves["layer:2"], run.curves["head:2.1"]) == (("by_layer", 2), ("head_01", 2))
    assert [row["mask"] for row in run.masks] == ["none", "layer:0", "layer:1", "layer:2", "head:2.1"]


def test_a_table_is_read_by_column_with_nan_for_empty_cells(tmp_path: Path) -> None:
    write_run(tmp_path, ["layer:1"])
    values = np.array([0.1, np.nan, 1e-300, -2.5, 1 / 3, 0, 7])
    write_heads(tmp_path, {"x": values}, "layer:1")
    table = load_files(tmp_path).table("heads.csv")
    assert table is not None
    assert np.array_equal(table["x"], np.tile(values, 2), equal_nan=True)
    assert table["mask"].tolist() == ["none"] * 7 + ["layer:1"] * 7
    assert table["layer"].tolist() == np.repeat(np.arange(3), HEADS).tolist() * 2
    assert table["layer"].dtype.kind == "i"


def test_a_description_is_read_model_by_model(tmp_path: Path) -> None:
    write_run(tmp_path, ["layer:1"])
    write_heads(tmp_path, {"x": np.arange(7.0)})
    run = load_files(tmp_path)
    assert list(run.described("heads")) == ["baseline"]
    write_heads(tmp_path, {"x": np.arange(7.0)}, "layer:1")
    write_heads(tmp_path, {"x": np.zeros(7)}, name="heads_change.csv")
    found = run.described("heads")
    assert {model: set(columns["mask"].tolist()) for model, columns in found.items()} == {
        "baseline": {"none"},
        "masked": {"layer:1"},
        "change": {"none"},
    }
    assert {model: len(columns["x"]) for model, columns in found.items()} == {"baseline": 7, "masked": 7, "change": 7}


def test_files_that_are_not_there_are_none(tmp_path: Path) -> None:
    run = load_files(write_run(tmp_path, ["layer:1"]))
    assert run.table("heads.csv") is None
    assert run.arrays("similarity.npz") == {}
    assert run.described("spectrum") == {}


def test_arrays_are_read_as_they_were_written(tmp_path: Path) -> None:
    run = load_files(write_run(tmp_path, ["layer:1"]))
    written = {"a": np.arange(6.0).reshape(2, 3), "scope": np.asarray("within")}
    write_arrays(tmp_path / "similarity.npz", written)
    found = run.arrays("similarity.npz")
    assert list(found) == ["a", "scope"]
    assert all(np.array_equal(found[name], written[name]) for name in written)


@pytest.mark.parametrize("name", ["run.json", "masks.json", "masks.csv"])
def test_a_run_without_one_of_its_files_is_refused_with_its_name(tmp_path: Path, name: str) -> None:
    (write_run(tmp_path, ["layer:1"]) / name).unlink()
    with pytest.raises(UsageError, match=f"is not the directory of a finished run: {name} is missing"):
        load_files(tmp_path)


# -- folders into which two runs have written --------------------------------------------------------------------------


def finished(folder: Path, spec: str, **record: Any) -> Path:
    """Write a run with the digests of its tables, as `test` does."""
    write_run(folder, [spec])
    names = ("masks.csv", "masks.json")
    digests = {name: hashlib.sha256((folder / name).read_bytes().rstrip(b"\n")).hexdigest() for name in names}
    return write_run(folder, [spec], results=digests, **record)


@pytest.mark.parametrize("name", ["masks.csv", "masks.json"])
def test_a_table_of_another_run_is_refused(tmp_path: Path, name: str) -> None:
    mine, other = finished(tmp_path / "mine", "layer:0", command="headprobe test"), finished(tmp_path / "o", "layer:2")
    assert load_files(mine).masks[1]["mask"] == "layer:0"
    shutil.copyfile(other / name, mine / name)
    with pytest.raises(UsageError, match=rf"does not belong to the {name} beside it.*\(headprobe test\).*mine'"):
        load_files(mine)


def test_a_run_of_the_same_masks_on_another_model_is_refused(tmp_path: Path) -> None:
    mine = finished(tmp_path / "mine", "layer:0")
    text = (mine / "masks.csv").read_text().replace("layer:0,zero,0", "layer:0,zero,0", 1)
    (mine / "masks.csv").write_text(text.replace(",40,", ",39,", 1))
    with pytest.raises(UsageError, match=r"does not belong to the masks\.csv"):
        load_files(mine)


def test_line_ends_that_git_changes_are_no_other_run(tmp_path: Path) -> None:
    mine = finished(tmp_path, "layer:0")
    (mine / "masks.csv").write_bytes((mine / "masks.csv").read_bytes().replace(b"\n", b"\r\n"))
    assert load_files(mine).masks[1]["mask"] == "layer:0"


def test_the_masks_of_a_record_without_digests_are_compared(tmp_path: Path) -> None:
    assert load_files(write_run(tmp_path, ["layer:0"], variants=[["layer:0", "digest", "zero", 0]]))
    write_run(tmp_path, ["layer:0"], variants=[["layer:2", "digest", "zero", 0]])
    with pytest.raises(UsageError, match=r"does not belong to the masks\.csv"):
        load_files(tmp_path)


def test_nothing_grows_by_a_run_that_is_a_mixture(tmp_path: Path) -> None:
    spec = MaskSpec(f"grow:{tmp_path}:drop_pp")
    write_run(tmp_path, ["each:head"])
    assert expand_all([spec], HEADS, "tiny")
    write_run(tmp_path, ["each:head"], results={"masks.csv": "another"})
    for path in (tmp_path, tmp_path / "masks.csv"):
        with pytest.raises(UsageError, match=r"does not belong to the masks\.csv"):
            expand_all([MaskSpec(f"grow:{path}:drop_pp")], HEADS, "tiny")


# -- files that are cut off, and paths that are no folder --


@pytest.mark.parametrize("cut", ["row", "cell", "name"])
def test_a_table_that_is_cut_off_is_refused_with_its_name(tmp_path: Path, cut: str) -> None:
    write_run(tmp_path, ["each:head", "grow:random:0-4"])
    text = (tmp_path / "shapley.csv").read_text(encoding="utf-8")
    rows = text.splitlines(keepends=True)
    kept = {"row": [*rows[:3], rows[3].rpartition(",")[0]], "cell": [*rows[:3], "heads\n"], "name": []}[cut]
    (tmp_path / "shapley.csv").write_text("".join(kept), encoding="utf-8")
    with pytest.raises(
        RunError, match=r"shapley\.csv cannot be read, as it is cut off.*ValueError.*got .*shapley\.csv'"
    ):
        load_files(tmp_path).table("shapley.csv")


def test_a_table_that_ends_behind_a_whole_row_is_refused_by_its_digest(tmp_path: Path) -> None:
    write_run(tmp_path, ["each:head", "grow:random:0-4"])
    text = (tmp_path / "shapley.csv").read_text(encoding="utf-8")
    digests = {name: hashlib.sha256((tmp_path / name).read_bytes().rstrip(b"\n")).hexdigest() for name in ALWAYS}
    digests["shapley.csv"] = hashlib.sha256(text.encode().rstrip(b"\n")).hexdigest()
    write_record(tmp_path, json.loads((tmp_path / "run.json").read_text()) | {"results": digests})
    assert load_files(tmp_path).table("shapley.csv")
    (tmp_path / "shapley.csv").write_text("".join(text.splitlines(keepends=True)[:-2]), encoding="utf-8")
    with pytest.raises(UsageError, match=r"does not belong to the shapley\.csv beside it.*cut off"):
        load_files(tmp_path)
    (tmp_path / "shapley.csv").unlink()  # what was never there, or was taken away, is no other run's
    assert load_files(tmp_path).table("shapley.csv") is None


ALWAYS = ("masks.csv", "masks.json")


@pytest.mark.parametrize("kept", [0, 100])
def test_arrays_that_are_cut_off_are_refused_with_the_name_of_the_file(tmp_path: Path, kept: int) -> None:
    file = write_run(tmp_path, ["each:head"]) / "groups.npz"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(RunError, match=r"groups\.npz cannot be read, as it is cut off"):
        load_files(tmp_path).arrays("groups.npz")


def test_a_file_in_the_place_of_a_folder_is_said_to_be_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"run\.json' is a file: give the directory of a finished run"):
        load_files(write_run(tmp_path, ["layer:1"]) / "run.json")
