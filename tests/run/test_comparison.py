"""Comparisons of runs: recomputed from their files by numpy and scipy alone, and what is refused."""

import csv
import json
import re
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from headprobe.errors import UsageError
from headprobe.run.comparison.names import names_of_runs
from headprobe.run.comparison.pairs import PAIRED, TWO_SAMPLE, Pair
from headprobe.run.comparison.tables import mask_rows, pairs_of, rank_rows
from headprobe.run.load import Row, load_files
from tests.run.small_runs import write_run

SPECS = ("each:head", "each:layer", "one-per-layer:0-9", "grow:random:0")
ROWS: dict[str, Any] = {
    "path": "photos",
    "local": True,
    "split": "val",
    "files": [{"name": "a.parquet", "size": 1}],
    "labels_sha256": "0",
    "max_images": None,
    "units": 1,
    "images": 40,
    "rows": None,
    "chosen_among": 6,
}
"""What run.json says of images whose files are known."""


def two(
    folder: Path, specs: tuple[str, ...] = SPECS, ablations: tuple[str, ...] = ("zero",), **differs: Any
) -> tuple[Path, Path]:
    """Two runs with other answers; what is given differs in the second's `data`."""
    first = write_run(folder / "one", specs, ablations, data=ROWS)
    return first, write_run(folder / "two", specs, ablations, seed=1, data={**ROWS, **differs})


def compared(*folders: Path) -> list[tuple[Pair, list[Row], list[Row]]]:
    runs = [load_files(folder) for folder in folders]
    found = []
    for pair in pairs_of(runs, names_of_runs(runs)):
        rows = mask_rows(pair)
        found.append((pair, rows, rank_rows(pair, rows)))
    return found


def csv_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "masks.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def group_means(folder: Path, quantity: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """By hand: sums of a quantity over the images of each group with any, `[rows, groups]`, of one image each."""
    with np.load(folder / "groups.npz") as groups:
        name = "nll" if quantity == "nll_rise" else "top1_count"
        sums = groups[name].astype(np.float64)[:, groups["images"] > 0]
    return sums - sums[0] if quantity == "nll_rise" else 100 * (sums[0] - sums)


@pytest.mark.parametrize("paired", [True, False])
def test_every_number_is_recomputed_by_hand(tmp_path: Path, paired: bool) -> None:
    folders = two(tmp_path) if paired else two(tmp_path, labels_sha256="1")
    [(pair, rows, _)] = compared(*folders)
    assert pair.test == (PAIRED if paired else TWO_SAMPLE)
    listed = [csv_rows(folder) for folder in folders]
    assert len(rows) == 2 * (len(listed[0]) - 1)
    for quantity, limits in (("nll_rise", "nll_rise_{}"), ("drop_pp", "drop_{}_pp")):
        sums = [group_means(folder, quantity) for folder in folders]  # a group of these runs has one image or none
        own = [row for row in rows if row["quantity"] == quantity]
        for place, row in enumerate(own, start=1):
            a, b = listed[0][place], listed[1][place]
            assert (row["mask"], row["ablation"]) == (a["mask"], a["ablation"])
            assert [row["value_a"], row["value_b"]] == [float(a[quantity]), float(b[quantity])]
            assert row["value_b_low"] == float(b[limits.format("low")])
            assert row["value_a_high"] == float(a[limits.format("high")])
            assert row["b_minus_a"] == pytest.approx(float(b[quantity]) - float(a[quantity]))
            if paired:
                test = stats.ttest_rel(sums[1][place], sums[0][place])
            else:
                test = stats.ttest_ind(sums[1][place], sums[0][place], equal_var=False)
            if row["b_minus_a"]:
                assert row["p"] == pytest.approx(test.pvalue)
                interval = test.confidence_interval()
                assert [row["b_minus_a_low"], row["b_minus_a_high"]] == pytest.approx([interval.low, interval.high])
            else:
                assert row["p"] == 1
        for family in ("each:head", "each:layer"):
            tested = [row for row in own if row["test_family"] == family]
            q = stats.false_discovery_control([float(row["p"]) for row in tested])
            np.testing.assert_allclose([float(row["bh_q"]) for row in tested], q)
        assert all(np.isnan(float(row["bh_q"])) for row in own if str(row["mask"]).startswith("one-per-layer"))


@pytest.mark.parametrize("paired", [True, False])
def test_ranks_are_of_the_masks_of_one_form(tmp_path: Path, paired: bool) -> None:
    folders = two(tmp_path) if paired else two(tmp_path, labels_sha256="1")
    [(_, rows, ranks)] = compared(*folders)
    assert [(row["test_family"], row["quantity"]) for row in ranks] == list(
        product(("each:head", "each:layer"), ("nll_rise", "drop_pp"))
    )  # neither nested masks nor nulls
    for rank in ranks:
        own = [row for row in rows if (row["test_family"], row["quantity"]) == (rank["test_family"], rank["quantity"])]
        values = [[float(row[side]) for row in own] for side in ("value_a", "value_b")]
        assert rank["masks"] == len(own)
        assert rank["spearman"] == pytest.approx(stats.spearmanr(*values).statistic)
        assert rank["kendall"] == pytest.approx(stats.kendalltau(*values).statistic)
        assert rank["masks_differing"] == sum(float(row["bh_q"]) <= 0.05 for row in own)
        assert np.isnan(float(rank["spearman_low"])) == (len(own) < 8)
        halves = [float(rank[f"reliability_{side}"]) for side in "ab"]
        ceiling = np.sqrt(halves[0] * halves[1]) if min(halves) > 0 and not paired else np.nan
        assert rank["ceiling"] == pytest.approx(ceiling, nan_ok=True)


def test_the_same_run_twice_has_no_difference(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", SPECS, ("zero", "mean"))  # without any identity of its images
    [(pair, rows, ranks)] = compared(run, run)
    assert (pair.test, pair.said, pair.other_rows) == (PAIRED, [], "")
    assert pair.first.name != pair.second.name
    assert {(row["b_minus_a"], row["b_minus_a_low"], row["b_minus_a_high"], row["p"]) for row in rows} == {(0, 0, 0, 1)}
    assert {round(float(row["spearman"]), 12) for row in ranks} == {1}
    assert {row["masks_differing"] for row in ranks} == {0}


def test_three_runs_are_three_pairs(tmp_path: Path) -> None:
    one, other = two(tmp_path)
    third = write_run(tmp_path / "three", SPECS, seed=2, data={**ROWS, "path": "sketches", "labels_sha256": "2"})
    found = compared(one, other, third)
    assert [pair.test for pair, _, _ in found] == [PAIRED, TWO_SAMPLE, TWO_SAMPLE]
    assert [(rows[0]["run_a"], rows[0]["run_b"]) for _, rows, _ in found] == [
        ("photos (one)", "photos (two)"),
        ("photos (one)", "sketches"),
        ("photos (two)", "sketches"),
    ]


def test_draws_count_with_their_mean(tmp_path: Path) -> None:
    folders = two(tmp_path, ("each:head",), ("resample:3",))
    [(_, rows, _)] = compared(*folders)
    listed = [csv_rows(folder) for folder in folders]
    for quantity in ("nll_rise", "drop_pp"):
        sums = [group_means(folder, quantity) for folder in folders]
        for row in (row for row in rows if row["quantity"] == quantity):
            places = [place for place, one in enumerate(listed[0]) if one["mask"] == row["mask"]]
            assert row["draws_a"] == row["draws_b"] == len(places) == 3
            means = [own[places].mean(axis=0) for own in sums]
            assert row["value_a"] == pytest.approx(means[0].mean())
            interval = stats.ttest_1samp(means[0], 0).confidence_interval()
            assert [row["value_a_low"], row["value_a_high"]] == pytest.approx([interval.low, interval.high])
            assert row["p"] == pytest.approx(stats.ttest_rel(*means).pvalue)


def test_images_that_count_as_wrong_unread_are_a_share_of_the_drop(tmp_path: Path) -> None:
    folders = two(tmp_path, ("each:head",))
    for folder in folders:  # as if 10 more images could not be read
        text = (folder / "masks.csv").read_text().splitlines()
        place = text[0].split(",").index("images")
        cells = [line.split(",") for line in text[1:]]
        drop = [text[0].split(",").index(name) for name in ("drop_pp", "drop_low_pp", "drop_high_pp")]
        for own in cells:
            own[place] = "50"
            for column in drop:
                own[column] = str(float(own[column]) * 40 / 50) if own[column] else ""
        (folder / "masks.csv").write_text("\n".join([text[0], *(",".join(own) for own in cells)]) + "\n")
    [(_, rows, _)] = compared(*folders)
    for row in (row for row in rows if row["quantity"] == "drop_pp"):
        middle = (float(row["b_minus_a_low"]) + float(row["b_minus_a_high"])) / 2
        assert middle == pytest.approx(row["b_minus_a"])


# -- which images ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("differs", "why"),
    [
        ({"labels_sha256": "1"}, "other labels_sha256"),
        ({"files": [{"name": "a.parquet", "size": 2}]}, "other files"),
        ({"max_images": 20}, "max_images: all and 20"),
        ({"rows": {"rule": "half", "calibrates": False}}, "rows: all and half"),
        ({"split": "test"}, "split: val and test"),
        ({"local": False, "path": "hub/photos"}, "path: photos and hub/photos"),
        ({"files": [], "labels_sha256": None}, "run.json does not say which images these were"),
    ],
)
def test_other_rows_are_two_samples_and_said(tmp_path: Path, differs: dict[str, Any], why: str) -> None:
    [(pair, rows, _)] = compared(*two(tmp_path, ("each:head",), **differs))
    assert why in pair.other_rows
    assert {row["test"] for row in rows} == {TWO_SAMPLE}


@pytest.mark.parametrize(
    "differs",
    [
        {"path": "copy_of_photos"},
        {"rows": {"rule": "same", "calibrates": False}},
        {"rows": {"rule": "split:train", "calibrates": False}},
        {"transform": "Resize(256)"},
        {"chosen_among": 3},
    ],
)
def test_the_same_images_elsewhere_or_taken_otherwise_are_paired(tmp_path: Path, differs: dict[str, Any]) -> None:
    [(pair, _, _)] = compared(*two(tmp_path, ("each:head",), **differs))
    assert pair.test == PAIRED


def test_images_that_only_one_run_could_read_are_no_pairs(tmp_path: Path) -> None:
    folders = two(tmp_path, ("each:head",))
    with np.load(folders[1] / "groups.npz") as groups:
        arrays = dict(groups)
    arrays["images"][np.flatnonzero(arrays["images"])[0]] = 0
    np.savez(folders[1] / "groups.npz", **arrays)
    [(pair, _, _)] = compared(*folders)
    assert pair.other_rows == "not the same images could be read (40 and 39)"


def test_what_else_differs_is_said(tmp_path: Path) -> None:
    layout = {"heads_per_layer": [2, 2, 3]}
    first = write_run(tmp_path / "one", ("each:head",), ("mean",), data=ROWS, calibration="a", precision="32-true")
    data = {**ROWS, "chosen_among": 3, "transform": "other", "rows": {"rule": "half", "calibrates": False}}
    model = {"name": "small", **layout, "inner_norm": True, "classifier": {"kind": "knn"}}
    second = write_run(
        tmp_path / "two", ("each:head",), ("mean",), model=model, data=data, calibration="b", precision="bf16-true"
    )
    [(pair, _, _)] = compared(first, second)
    said = "\n".join(pair.said)
    for words in (
        "other models: tiny and small",
        "a norm over all heads rescales the others",
        "other classifiers: the model's own and knn",
        "predictions are among 6 and 3 classes",
        "prepared in other ways",
        "constants were fitted on other kinds of rows: other and half",
        "other precision: 32-true and bf16-true",
    ):
        assert words in said


# -- what cannot be compared -------------------------------------------------------------------------------------------


def changed(run: Path, **entries: Any) -> Path:
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, **entries}))
    return run


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ({"status": "failed"}, "only finished runs can be compared, and this one is 'failed'"),
        ({"status": "running"}, "this one is 'running'"),
        ({"schema": 99}, "schema 99"),
        (
            {"model": {"name": "wide", "heads_per_layer": [2, 2, 4]}},
            "other head layouts: 7 heads in 3 layers and 8 heads",
        ),
        ({"model": {"name": "other", "heads_per_layer": [2, 3, 2]}}, "heads per layer [2, 2, 3] and heads per layer"),
        ({"model": {"name": "tiny", "heads_per_layer": [2, 2, 3], "semantics": "attention"}}, "other semantics"),
    ],
)
def test_runs_that_differ_in_what_a_mask_is_are_refused(tmp_path: Path, entries: dict[str, Any], why: str) -> None:
    first, second = two(tmp_path, ("each:head",))
    with pytest.raises(UsageError, match=re.escape(why)):
        compared(first, changed(second, **entries))


def test_runs_without_a_mask_in_common_are_refused_with_what_they_have(tmp_path: Path) -> None:
    heads = write_run(tmp_path / "heads", ("each:head",))
    for name, specs, ablations, why in (
        ("layers", ("each:layer",), ("zero",), "other masks: head:0.0, head:0.1, ... and layer:0, layer:1, ..."),
        ("means", ("each:head",), ("mean",), "other ablations: zero and mean"),
    ):
        with pytest.raises(UsageError, match=re.escape(why)):
            compared(heads, write_run(tmp_path / name, specs, ablations))
    with pytest.raises(UsageError, match="scored the whole model alone"):
        compared(heads, write_baseline(tmp_path / "baseline"))
    (heads / "groups.npz").unlink()
    with pytest.raises(UsageError, match=r"groups.npz is missing: an older release"):
        compared(heads, heads)


def write_baseline(folder: Path) -> Path:
    """A run that scored no mask."""
    run = write_run(folder, ("each:head",))
    lines = (run / "masks.csv").read_text().splitlines()
    (run / "masks.csv").write_text("\n".join(lines[:2]) + "\n")
    return run


def test_masks_in_common_are_compared_and_the_others_counted(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", ("each:head", "each:layer"), ("zero", "mean"))
    other = write_run(tmp_path / "two", ("each:head", "random:3:0-1"), seed=1)
    [(pair, rows, _)] = compared(one, other)
    assert len(pair.keys) == 7
    assert len(rows) == 14
    assert sum("left out" in text for text in pair.said) == 2
    assert any(text.startswith("13 masks of one alone left out") for text in pair.said)  # 7 means, 3 layers twice


def test_masks_of_one_name_that_hit_other_heads_are_no_pair(tmp_path: Path) -> None:
    one, other = two(tmp_path, ("each:head",))
    masks = json.loads((other / "masks.json").read_text())
    masks["head:0.0"]["masked_heads"] = {"2": [2]}
    (other / "masks.json").write_text(json.dumps(masks))
    [(pair, rows, _)] = compared(one, other)
    assert "head:0.0" not in {row["mask"] for row in rows}
    assert any(text.startswith("1 mask left out that hit other heads") for text in pair.said)


def test_groups_of_another_run_are_refused(tmp_path: Path) -> None:
    one, other = two(tmp_path, ("each:head",))
    (one / "groups.npz").write_bytes((write_run(tmp_path / "three", ("each:layer",)) / "groups.npz").read_bytes())
    with pytest.raises(UsageError, match="of another run than"):
        compared(one, other)


# -- runs without labels -----------------------------------------------------------------------------------------------


def without_labels(run: Path, by_group: bool = True) -> Path:
    """Turn a run into one that measured features alone: its NLL rises stand for their distances."""
    rows = csv_rows(run)
    kept = ("mask", "ablation", "draw", "calibration", "test_family", "heads_masked", "images")
    names = {
        "nll_rise": "feature_distance",
        "nll_rise_low": "feature_distance_low",
        "nll_rise_high": "feature_distance_high",
    }
    with (run / "masks.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*kept, *names.values()])
        writer.writeheader()
        for row in rows:
            writer.writerow({**{name: row[name] for name in kept}, **{names[name]: row[name] for name in names}})
    with np.load(run / "groups.npz") as groups:
        arrays = dict(groups)
    nll, images = arrays.pop("nll"), arrays.pop("images")
    arrays.pop("top1_count")
    arrays["feature_images"] = np.tile(images, (len(rows), 1))
    np.savez(run / "groups.npz", **arrays, **({"feature_distance": nll - nll[0]} if by_group else {}))
    return run


def test_runs_without_labels_are_compared_by_features(tmp_path: Path) -> None:
    labelled = compared(*two(tmp_path, ("each:head",)))[0]
    bare = compared(*(without_labels(run) for run in (tmp_path / "one", tmp_path / "two")))[0]
    assert bare[0].quantities == ["feature_distance"]
    for row, same in zip(bare[1], labelled[1], strict=False):
        assert [row[name] for name in ("mask", "value_a", "b_minus_a")] == [
            same[name] for name in ("mask", "value_a", "b_minus_a")
        ]
        assert row["p"] == pytest.approx(same["p"])
    assert bare[2][0]["spearman"] == pytest.approx(labelled[2][0]["spearman"])


def test_features_without_sums_by_group_have_values_and_ranks_and_no_test(tmp_path: Path) -> None:
    two(tmp_path, ("each:head",))
    [(_, rows, [ranks])] = compared(*(without_labels(tmp_path / name, by_group=False) for name in ("one", "two")))
    assert np.isfinite([float(row["b_minus_a"]) for row in rows]).all()
    assert np.isnan([float(row[name]) for row in rows for name in ("p", "bh_q", "b_minus_a_low")]).all()
    values = [[float(row[side]) for row in rows] for side in ("value_a", "value_b")]
    assert ranks["spearman"] == pytest.approx(stats.spearmanr(*values).statistic)
    assert np.isnan(float(ranks["masks_differing"]))


def test_a_mask_with_a_feature_that_is_not_finite_has_no_test_and_leaves_the_others_theirs(tmp_path: Path) -> None:
    two(tmp_path, ("each:head",))
    runs = [without_labels(tmp_path / name) for name in ("one", "two")]
    before = compared(*runs)[0][1]
    with np.load(runs[1] / "groups.npz") as groups:
        arrays = dict(groups)
    group = np.flatnonzero(arrays["feature_images"][0])[0]
    arrays["feature_images"][3, group] = 0  # one image fewer of the third mask
    np.savez(runs[1] / "groups.npz", **arrays)
    after = compared(*runs)[0][1]
    assert [np.isnan(float(row["p"])) for row in after] == [False, False, True, False, False, False, False]
    assert after[2]["value_b"] == before[2]["value_b"]
    assert [row["p"] for row in after if row["mask"] != "head:1.0"] == [
        row["p"] for row in before if row["mask"] != "head:1.0"
    ]


def test_a_run_with_labels_and_one_with_features_alone_have_nothing_in_common(tmp_path: Path) -> None:
    one, other = two(tmp_path, ("each:head",))
    with pytest.raises(UsageError, match="the one measured nll_rise, drop_pp, the other feature_distance"):
        compared(one, without_labels(other))


# -- names -------------------------------------------------------------------------------------------------------------


def test_runs_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    def named(*runs: tuple[str, str, str]) -> list[str]:
        made = []
        for folder, model, data in runs:
            about = {"name": model, "heads_per_layer": [2, 2, 3]}
            path = write_run(tmp_path / folder, ("each:head",), model=about, data={"path": data, "split": "test"})
            made.append(load_files(path))
        return names_of_runs(made)

    assert named(("a", "vit", "in"), ("b", "vit", "in-r")) == ["in", "in-r"]
    assert named(("c", "vit", "in"), ("d", "deit", "in")) == ["vit", "deit"]
    assert named(("e", "vit", "in"), ("f", "deit", "in-r")) == ["vit on in", "deit on in-r"]
    assert named(("g/l/v_0", "vit", "in"), ("h/l/v_0", "vit", "in")) == ["g", "h"]
    assert named(("i/l/v_0", "vit", "in"), ("i/l/v_1", "vit", "in")) == ["v_0", "v_1"]
