"""A run is read as pandas frames and arrays: every number as in its file, in its documented type and unit."""

import csv
import json
import math
import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import headprobe
from headprobe.calibration.constants import (
    Calibration,
    LayerConstants,
    from_bytes,
    read_calibration,
    save_calibration,
    to_bytes,
)
from headprobe.commands.help import SCREENS
from headprobe.errors import RunError, UsageError
from headprobe.loaded.tables import MADE_BY, TABLES
from headprobe.mixture import CHECKED
from headprobe.run.columns import COLUMNS, MAY_BE_EMPTY, Kind, unit_of
from headprobe.run.load import load_files
from headprobe.run.results import write_arrays, write_rows
from tests.loaded.whole_runs import AWKWARD, PLACES
from tests.run.small_runs import write_run

ROOT = Path(__file__).resolve().parents[2]

CSV = [name for name in TABLES if name.endswith(".csv") and name not in ("bad_images.csv", "spectrum_change.csv")]


@pytest.fixture
def run(whole: Path) -> headprobe.Run:
    return headprobe.load_run(whole)


# -- numbers and types -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CSV)
def test_every_cell_of_a_frame_is_the_files(run: headprobe.Run, whole: Path, name: str) -> None:
    with (whole / name).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    frame = run.frame(name)
    assert list(frame.columns) == list(rows[0])
    assert len(frame) == len(rows)
    for column in frame.columns:
        for found, text in zip(frame[column].tolist(), (row[column] for row in rows), strict=True):
            if isinstance(found, str):
                assert found == text
            elif text == "":
                assert pd.isna(found)
            else:
                assert float(found) == float(text)  # to the last bit


@pytest.mark.parametrize("name", CSV)
def test_pandas_alone_reads_the_same_numbers(run: headprobe.Run, whole: Path, name: str) -> None:
    alone = pd.read_csv(whole / name)
    frame = run.frame(name)
    numeric = [column for column in frame.columns if pd.api.types.is_numeric_dtype(frame[column])]
    assert numeric
    for column in numeric:
        mine, other = (one[column].to_numpy(dtype="float64", na_value=np.nan) for one in (frame, alone))
        np.testing.assert_allclose(mine, other, rtol=1e-11)  # pandas before 3 loses the last digits


def test_awkward_floats_are_read_to_the_last_bit(run: headprobe.Run) -> None:
    assert np.array_equal(run.heads["mine"].to_numpy(), AWKWARD, equal_nan=True)


def test_text_that_looks_missing_stays_text(run: headprobe.Run) -> None:
    assert run.classes["name"].tolist() == ["NA", "none", "nan", 'a "quoted", name', ""]
    assert run.masks["mask"].iloc[0] == "none"
    assert (run.masks["test_family"] == "").sum() > 1


def test_a_cell_without_a_whole_number_is_missing_and_the_others_stay_whole(run: headprobe.Run) -> None:
    rank = run.heads["rank"]
    assert str(rank.dtype) == "Int64"
    assert rank.isna().tolist() == [place == 2 for place in range(len(PLACES))]
    assert rank.dropna().tolist() == [3, 4, 5, 6, 7, 8]
    layers = run.shapley.query("players == 'layers'")
    assert layers["head"].isna().all()
    assert set(layers["layer"]) == {0, 1, 2}


def test_images_are_read_with_a_missing_label_and_empty_reasons(run: headprobe.Run) -> None:
    assert run.images["source"].tolist() == ["a.png", "b.png"]
    assert run.images["label"].isna().tolist() == [False, True]
    assert run.images["reason"].tolist() == ["", "no image"]
    assert {name: str(kind) for name, kind in run.images.dtypes.items() if name in ("unit", "row", "label")} == {
        "unit": "int64",
        "row": "int64",
        "label": "Int64",
    }


def test_a_statistic_of_a_users_own_is_of_floats_or_of_text(tmp_path: Path) -> None:
    write_run(tmp_path, ["layer:1"])
    write_rows(tmp_path / "heads.csv", [{"mask": "none", "layer": 0, "head": 0, "images": 3, "own": 2, "word": "two"}])
    heads = headprobe.load_run(tmp_path).heads
    assert heads["own"].dtype == np.float64
    assert heads["word"].tolist() == ["two"]
    assert heads.attrs["units"]["own"] == ""


# -- the documentation -----------------------------------------------------------------------------------------------

ROW = re.compile(r"^\| (`[^|]*)\|([^|]*)\|", re.MULTILINE)


def documented_units() -> dict[str, set[str]]:
    """Every column that a table `| column | unit | ...` of the docs defines, with its units."""
    found: dict[str, set[str]] = {}
    for page in ("results.md", "describe_heads.md"):
        for section in (ROOT / "docs" / page).read_text(encoding="utf-8").split("\n## "):
            if "| column | unit |" not in section or section.startswith("records"):
                continue  # records are read as Parquet files, in the types of their schema
            for names, unit in ROW.findall(section.partition("| column | unit |")[2]):
                for name in re.findall(r"`(\w+)`", names):
                    found.setdefault(name, set()).add(unit.strip())
    return found


def documented_types() -> dict[str, str]:
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    table = page.partition("| dtype | columns |")[2].partition("\n\n")[0]
    return dict(re.findall(r"^\| `(\w+)`[^|]*\| ([^|]*) \|", table, re.MULTILINE))


def test_every_documented_column_has_its_unit_and_every_column_is_documented() -> None:
    documented = documented_units()
    assert len(documented) > 100
    assert {name: {column.unit} for name, column in COLUMNS.items()} == documented


def test_types_are_documented(run: headprobe.Run) -> None:
    types = documented_types()
    names = {kind: set(re.findall(r"`(\w+)`", types[kind])) for kind in ("str", "int64")}
    assert names["str"] == {name for name, column in COLUMNS.items() if column.kind is Kind.TEXT}
    empty = {
        table: frozenset(re.findall(r"`(\w+)`", listed))
        for listed, table in re.findall(r"([^;]*) of `([\w.]+)`", types["Int64"])
    }
    assert empty == MAY_BE_EMPTY
    whole = {name for name, column in COLUMNS.items() if column.kind is Kind.INTEGER}
    assert names["int64"] | set().union(*empty.values()) == whole


@pytest.mark.parametrize("name", [*CSV, "images.parquet"])
def test_every_column_has_its_documented_type_and_unit(run: headprobe.Run, name: str) -> None:
    frame = run.frame(name)
    text = pd.Series(["a"], dtype="str").dtype
    for column in frame.columns:
        kind = COLUMNS[column].kind if column in COLUMNS else Kind.FLOAT
        empty = column in MAY_BE_EMPTY.get(name, ())
        wanted = {Kind.TEXT: str(text), Kind.FLOAT: "float64", Kind.INTEGER: "Int64" if empty else "int64"}[kind]
        assert str(frame[column].dtype) == wanted, column
    assert frame.attrs["units"] == {column: unit_of(column) for column in frame.columns}
    assert frame.attrs["file"] == name


def test_a_standard_error_has_the_unit_of_its_statistic(run: headprobe.Run) -> None:
    assert run.heads.attrs["units"]["attention_distance_px_se"] == "pixels"
    assert run.masks.attrs["units"]["nll_rise_low"] == "nats"


# -- what is there, and what is not ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in TABLES if name != "spectrum_change.csv"])
def test_every_table_is_an_attribute(run: headprobe.Run, name: str) -> None:
    assert getattr(run, name.partition(".")[0]) is run.frame(name)  # what one adds to a frame stays


def test_what_a_run_lacks_is_said_with_what_makes_it(tmp_path: Path) -> None:
    run = headprobe.load_run(write_run(tmp_path, ["layer:1"]))
    assert run.tables == ("masks.csv",)
    with pytest.raises(UsageError, match=r"no scores\.csv: a test with --score-heads makes it, got "):
        _ = run.scores
    with pytest.raises(UsageError, match=r"no similarity\.npz: a test with the callback HeadSimilarity"):
        _ = run.similarity
    with pytest.raises(UsageError, match=r"a run's tables are masks\.csv, .*got 'scores'"):
        run.frame("scores")
    assert not hasattr(run, "scores")
    assert getattr(run, "offset_maps", None) is None
    assert list(run.bad_images.columns) == ["unit", "row", "source", "reason"]
    assert len(run.bad_images) == 0


@pytest.mark.parametrize("cut", ["row", "nothing left"])
def test_a_table_that_is_cut_off_is_refused_with_its_name(tmp_path: Path, cut: str) -> None:
    file = write_run(tmp_path, ["each:head", "grow:random:0-4"]) / "shapley.csv"
    content = file.read_bytes()
    file.write_bytes(content[: content.rindex(b",")] if cut == "row" else b"")
    with pytest.raises(RunError, match=r"shapley\.csv cannot be read, as it is cut off"):
        _ = headprobe.load_run(tmp_path).shapley


def test_a_run_without_bad_images_has_a_table_of_them_in_its_types(tmp_path: Path) -> None:
    frame = headprobe.load_run(write_run(tmp_path, ["layer:1"])).bad_images
    assert len(frame) == 0
    assert [frame[name].dtype.kind for name in ("unit", "row")] == ["i", "i"]
    assert all(pd.api.types.is_string_dtype(frame[name].dtype) for name in ("source", "reason"))


def test_what_makes_a_table_is_written_as_the_command_takes_it() -> None:
    with_value = {option for made in MADE_BY.values() for option in re.findall(r"(--[\w.-]+) true", made)}
    assert with_value
    for option in with_value:  # an option without a value takes no `true`
        assert f"{option} true" in SCREENS["test"]
    assert not {"--records", "--score-heads"} & with_value


def test_the_record_has_digests_of_all_that_would_be_read_wrongly_when_cut_off() -> None:
    assert set(CHECKED) == {name for name in TABLES if name.endswith(".csv")} | {"masks.json"}


def test_heads_of_masks_meta_and_arrays_are_those_of_the_files(run: headprobe.Run, whole: Path) -> None:
    assert run.masked_heads["layer:2"] == [(2, 0), (2, 1), (2, 2)]
    assert run.masked_heads["head:2.1"] == [(2, 1)]
    assert run.meta == json.loads((whole / "run.json").read_text())
    with np.load(whole / "similarity.npz") as found:
        assert set(run.similarity) == set(found.files) - {"schema"}
        assert np.array_equal(run.similarity["svcca"], found["svcca"], equal_nan=True)
    assert run.offset_maps["layer_000"].shape == (2, 3, 3)
    rows = run.masks
    assert run.groups["mask"].tolist() == rows["mask"].tolist()
    np.testing.assert_array_equal(run.groups["top1_count"].sum(1), rows["top1_count"])


def test_reading_needs_neither_torch_nor_lightning(whole: Path) -> None:
    code = (
        "import sys, headprobe\n"
        "assert not {'pandas', 'numpy', 'matplotlib'} & sys.modules.keys()\n"
        "run = headprobe.load_run(sys.argv[1])\n"
        "run.masks, run._repr_html_(), headprobe.load_runs(sys.argv[1]).heads\n"
        "heavy = {'torch', 'torchvision', 'torchmetrics', 'lightning', 'timm', 'datasets', 'matplotlib.pyplot'}\n"
        "sys.stdout.write(str(sorted(heavy & sys.modules.keys())))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(whole)], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("[]", "")


# -- versions of the files -------------------------------------------------------------------------------------------


def change(file: Path, **changed: Any) -> None:
    content = json.loads(file.read_text())
    content |= changed
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_every_json_and_npz_file_says_its_version(whole: Path) -> None:
    for name in ("run.json", "masks.json"):
        assert json.loads((whole / name).read_text())["schema"] == 1
    for name in ("groups.npz", "similarity.npz", "offset_maps.npz"):
        with np.load(whole / name) as found:
            assert int(found["schema"]) == 1


def test_a_run_of_before_is_read_as_version_0(tmp_path: Path) -> None:
    write_run(tmp_path, ["each:layer"])
    for name in ("run.json", "masks.json"):
        change(tmp_path / name, schema=None)
    with np.load(tmp_path / "groups.npz") as found:
        np.savez(tmp_path / "groups.npz", **{name: found[name] for name in found.files if name != "schema"})
    table = pd.read_csv(tmp_path / "masks.csv", dtype=str, keep_default_na=False)
    table.drop(columns=["calibration", "e_bh_q", "log_e_value"]).to_csv(tmp_path / "masks.csv", index=False)
    run = headprobe.load_run(tmp_path)
    assert run.masks.attrs["schema"] == 0
    assert run.masks["drop_pp"].tolist() == table["drop_pp"].astype(float).tolist()
    assert "calibration" not in run.masks
    assert len(run.groups["mask"]) == len(run.masks)
    assert run.plot.drops()


@pytest.mark.parametrize("name", ["run.json", "masks.json"])
def test_a_newer_run_is_refused_with_what_to_do(tmp_path: Path, name: str) -> None:
    change(write_run(tmp_path, ["layer:1"]) / name, schema=2)
    with pytest.raises(UsageError, match=rf"{name} has schema 2, .* reads 0 to 1: .*update headprobe .*got "):
        headprobe.load_run(tmp_path)


def test_newer_arrays_are_refused_with_what_to_do(tmp_path: Path) -> None:
    write_run(tmp_path, ["layer:1"])
    write_arrays(tmp_path / "groups.npz", {"schema": np.asarray(7), "mask": np.array(["none"])})
    with pytest.raises(UsageError, match=r"groups\.npz has schema 7"):
        _ = headprobe.load_run(tmp_path).groups


def test_heads_do_not_grow_by_a_newer_run(tmp_path: Path) -> None:
    change(write_run(tmp_path, ["each:head"]) / "run.json", schema=2)
    with pytest.raises(UsageError, match=r"run\.json has schema 2"):
        headprobe.MaskSpec(f"grow:{tmp_path}:drop_pp").expand([2, 2, 3], "tiny")


def test_a_mask_is_taken_from_masks_json_whatever_its_version(tmp_path: Path) -> None:
    file = write_run(tmp_path, ["head:2.1"]) / "masks.json"
    (mask,) = headprobe.MaskSpec(f"file:{file}").expand([2, 2, 3], "tiny")
    assert mask.mask.masked == {(2, 1)}
    change(file, schema=2)
    with pytest.raises(UsageError, match=r"masks\.json has schema 2"):
        headprobe.MaskSpec(f"file:{file}").expand([2, 2, 3], "tiny")


def test_newer_constants_of_a_calibration_are_refused_and_older_ones_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = Calibration([LayerConstants(3, np.zeros((2, 4)))], {"images": 3})
    assert from_bytes(to_bytes(calibration)).about == {"images": 3}
    monkeypatch.setattr("headprobe.calibration.constants.SCHEMA", 2)
    save_calibration(calibration, tmp_path)
    assert json.loads((tmp_path / "calibration.json").read_text())["schema"] == 2
    with pytest.raises(UsageError, match=r"schema 2, and this headprobe reads 0 to 1: .*update headprobe"):
        read_calibration(tmp_path)
    monkeypatch.setattr("headprobe.calibration.constants.SCHEMA", None)
    save_calibration(calibration, tmp_path)
    assert read_calibration(tmp_path).about == {"images": 3}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("masks.json", '{"layer:1": {"masked_heads": {"1": [0]}}}'),
        ("run.json", "{"),
        ("masks.csv", "mask,top1\nnone,x\n"),
    ],
)
def test_files_of_another_form_are_one_line_with_the_reason(tmp_path: Path, name: str, text: str) -> None:
    (write_run(tmp_path, ["layer:1"]) / name).write_text(text)
    with pytest.raises(UsageError, match=r"^the files of this run are not as headprobe writes .*run it again"):
        load_files(tmp_path)


# -- what a notebook shows -------------------------------------------------------------------------------------------


def test_a_notebook_shows_the_model_the_data_the_baseline_and_the_largest_drops(
    run: headprobe.Run, whole: Path
) -> None:
    html = unescape(re.sub(r"<[^>]+>", "|", run._repr_html_()))
    rows = pd.read_csv(whole / "masks.csv", keep_default_na=False)
    baseline = rows.iloc[0]
    assert f"top-1 {100 * baseline['top1']:.2f}%" in html
    assert "|tiny|" in html
    assert "digits test, 40 images" in html
    largest = rows.iloc[1:].sort_values("drop_pp", ascending=False, kind="stable").iloc[0]
    assert f"|{largest['mask']}||{largest['heads_masked']}||{largest['ablation']}||{largest['drop_pp']:+.2f} [" in html
    assert "scores, importance" in html


HOSTILE = '<script>alert("x")</script> \'&\u202e🙂'


def test_hostile_text_is_shown_as_text(tmp_path: Path) -> None:
    model = {"name": HOSTILE, "title": HOSTILE, "heads_per_layer": [2, 2, 3]}
    data = {"path": HOSTILE, "split": HOSTILE}
    html = headprobe.load_run(write_run(tmp_path, ["each:layer"], model=model, data=data))._repr_html_()
    assert "<script" not in html
    assert html.count("&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt; &#x27;&amp;\u202e🙂") == 3


@pytest.mark.parametrize(("record", "said"), [({"status": "failed"}, "failed"), ({"bad_images": 3}, "bad images")])
def test_a_notebook_says_what_went_wrong(tmp_path: Path, record: dict[str, Any], said: str) -> None:
    plain = headprobe.load_run(write_run(tmp_path / "a", ["layer:1"]))._repr_html_()
    assert said not in plain
    assert said in headprobe.load_run(write_run(tmp_path / "b", ["layer:1"], **record))._repr_html_()


def test_a_run_of_the_baseline_alone_is_shown(tmp_path: Path) -> None:
    run = headprobe.load_run(write_run(tmp_path, ["none"]))
    assert "baseline" in run._repr_html_()
    assert not math.isnan(run.masks["top1"].iloc[0])
