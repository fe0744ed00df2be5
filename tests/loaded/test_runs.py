"""Several runs are joined by name; what cannot be read or is not there is named."""

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import headprobe
from headprobe.errors import HeadprobeWarning, UsageError
from tests.loaded.whole_runs import write_whole_run
from tests.run.small_runs import write_run


@pytest.fixture
def two(tmp_path: Path) -> Path:
    write_run(tmp_path / "vit" / "lightning_logs" / "version_0", ["each:layer"])
    write_run(tmp_path / "swin" / "lightning_logs" / "version_0", ["each:head", "grow:random:0"])
    return tmp_path


def test_tables_are_joined_with_the_name_of_the_run_in_front(two: Path) -> None:
    runs = headprobe.load_runs(f"{two}/*/lightning_logs/version_0")
    assert list(runs) == ["swin", "vit"]
    parts = []
    for name in runs:
        alone = pd.read_csv(two / name / "lightning_logs" / "version_0" / "masks.csv", keep_default_na=False)
        parts.append(alone.assign(run=name))
    oracle = pd.concat(parts, ignore_index=True)
    masks = runs.masks
    assert list(masks.columns) == ["run", *[name for name in oracle.columns if name != "run"]]
    for column in ("run", "mask", "top1_count", "drop_pp"):
        assert masks[column].tolist() == oracle[column].tolist()
    assert masks["top1_count"].dtype == np.int64
    assert masks.attrs["units"] == {"run": "", **runs["vit"].masks.attrs["units"]}
    assert runs.masks is masks


def test_one_of_several_runs_is_as_it_is_alone(two: Path) -> None:
    runs = headprobe.load_runs(f"{two}/*/lightning_logs/version_0")
    assert "run" not in runs["vit"].masks
    assert runs.meta["vit"] == runs["vit"].meta
    assert runs.masked_heads["vit"]["layer:2"] == [(2, 0), (2, 1), (2, 2)]
    assert runs.groups.keys() == {"vit", "swin"}
    assert runs["vit"].plot.drops()
    assert "vit" in runs._repr_html_()


def test_a_table_that_some_runs_lack_is_of_the_others_and_a_warning_names_them(two: Path) -> None:
    runs = headprobe.load_runs(f"{two}/*/lightning_logs/version_0")
    with pytest.warns(HeadprobeWarning, match=r"^curves\.csv is of 1 of 2 runs; without it: vit$"):
        curves = runs.curves
    assert set(curves["run"]) == {"swin"}
    assert curves.attrs["runs_without"] == ["vit"]
    with pytest.raises(UsageError, match=r"no scores\.csv: a test with --score-heads makes it"):
        _ = runs.scores
    with pytest.raises(UsageError, match=r"no similarity\.npz"):
        _ = runs.similarity
    assert not hasattr(runs, "scores")


def test_columns_of_one_run_alone_are_empty_in_the_others(tmp_path: Path) -> None:
    for number in (0, 1):
        write_whole_run(tmp_path / f"version_{number}")
    heads = pd.read_csv(tmp_path / "version_1" / "heads.csv")
    heads.drop(columns=["mine", "rank"]).to_csv(tmp_path / "version_1" / "heads.csv", index=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        joined = headprobe.load_runs(f"{tmp_path}/version_*").heads.set_index("run")
    assert joined.loc["version_1", "mine"].isna().all()
    assert str(joined["rank"].dtype) == "Int64"
    assert joined["layer"].dtype == np.int64


def test_runs_come_in_the_order_of_their_numbers_and_a_list_in_its_own(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        write_run(tmp_path / f"version_{number}", ["layer:1"])
    assert list(headprobe.load_runs(f"{tmp_path}/version_*")) == ["version_1", "version_2", "version_10"]
    listed = [tmp_path / "version_10", tmp_path / "version_1"]
    assert list(headprobe.load_runs(listed)) == ["version_10", "version_1"]
    assert list(headprobe.load_runs(listed[0])) == ["version_10"]


def test_names_are_what_tells_the_paths_apart(tmp_path: Path) -> None:
    places = ["a/x/version_0", "a/x/version_1", "b/version_0"]
    for place in places:
        write_run(tmp_path / place, ["layer:1"])
    assert list(headprobe.load_runs(f"{tmp_path}/**/version_*")) == places


def test_runs_that_cannot_be_read_are_named_and_the_others_are_read(two: Path) -> None:
    (two / "vit" / "lightning_logs" / "version_0" / "masks.json").unlink()
    (two / "units" / "lightning_logs" / "version_0").mkdir(parents=True)  # no run: nothing to name
    with pytest.warns(HeadprobeWarning, match=r"^1 of 2 runs cannot be read: '.*vit.*masks\.json is missing"):
        runs = headprobe.load_runs(f"{two}/*/lightning_logs/version_0")
    assert len(runs) == 1
    assert list(runs.unread) == [f"{two}/vit/lightning_logs/version_0"]
    assert "masks.json is missing" in runs._repr_html_()


def test_where_no_run_is_or_none_can_be_read_is_an_error(two: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no run: give a pattern such as .*got '.*nowhere"):
        headprobe.load_runs(f"{two}/nowhere*")
    with pytest.raises(UsageError, match=r"there is no run"):
        headprobe.load_runs([])
    with pytest.raises(UsageError, match=r"none of 1 run can be read: .*run\.json is missing"):
        headprobe.load_runs([two])


def test_a_run_that_two_paths_lead_to_counts_once(two: Path) -> None:
    vit, swin = (two / name / "lightning_logs" / "version_0" for name in ("vit", "swin"))
    (two / "link").symlink_to(vit)
    runs = headprobe.load_runs([vit, swin, swin / ".." / "version_0", two / "link"])
    assert list(runs) == ["vit", "swin"]
    assert len(runs.masks) == len(headprobe.load_run(vit).masks) + len(headprobe.load_run(swin).masks)
