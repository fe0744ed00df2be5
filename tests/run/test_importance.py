"""`importance.csv` follows from `scores.csv`, `heads.csv`, `masks.csv` and `groups.npz`; the oracle is scipy."""

import math
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import kendalltau, rankdata, spearmanr

from headprobe.callbacks import results
from headprobe.report.run_figures import run_figures
from headprobe.report.table import console, importance_table
from headprobe.run.importance import importance_of
from headprobe.run.load import Row, RunFiles, load_files
from headprobe.run.results import write_masks, write_rows
from tests.cli_runs import QUICK, command
from tests.report.drawn import drawn, texts
from tests.run.small_runs import HEADS, IMAGES, write_heads, write_run

PLACES = [(layer, head) for layer, count in enumerate(HEADS) for head in range(count)]
ABLATIONS = ("zero", "mean", "resample:3")
GOOD, TIED, GAPS = "gradient_abs", "stable_rank", "direct_logit"

Columns = dict[str, list[float]]


def columns() -> Columns:
    """Scores of seven heads: one without ties, one with, one that two heads lack, a constant and an empty one."""
    rng = np.random.default_rng(3)
    return {
        GOOD: rng.exponential(size=7).tolist(),
        TIED: [1.0, 2.0, 2.0, 1.0, 3.0, 3.0, 1.0],
        GAPS: [0.5, math.nan, 0.1, 0.4, math.inf, 0.3, -0.2],
        "taylor_zero": [2.0] * 7,
        "taylor_mean": [math.nan] * 7,
    }


def write_scores(folder: Path, scores: Columns, places: list[tuple[int, int]] = PLACES, images: int = 31) -> None:
    keys = [{"layer": layer, "head": head, "images": images} for layer, head in places]
    write_rows(folder / "scores.csv", [key | {name: scores[name][n] for name in scores} for n, key in enumerate(keys)])


def small_run(folder: Path, specs: tuple[str, ...] = ("each:head",), **record: Any) -> RunFiles:
    write_run(folder, specs, ABLATIONS, **record)
    write_scores(folder, columns())
    write_heads(folder, {"confidence": np.arange(7.0) ** 2 % 5, "confidence_se": np.ones(7), "sink_mass": np.ones(7)})
    return load_files(folder)


@pytest.fixture
def run(tmp_path: Path) -> RunFiles:
    return small_run(tmp_path)


def one(run: RunFiles, **wanted: str) -> Row:
    wanted = {"ablation": "zero", "target": "nll_rise", "scope": "all", "rows": "calibration"} | wanted
    (row,) = [row for row in importance_of(run) if all(row[key] == value for key, value in wanted.items())]
    return row


def measured(run: RunFiles, ablation: str, target: str) -> dict[tuple[int, int], float]:
    """The mean of draws of each head's own mask, from masks.csv; rounded, so that equal ones are ties."""
    found: dict[tuple[int, int], list[float]] = {}
    for row in run.masks[1:]:
        if row["ablation"] == ablation and len(run.heads[str(row["mask"])]) == 1:
            found.setdefault(run.heads[str(row["mask"])][0], []).append(float(row[target]))
    return {head: round(float(np.mean(values)), 12) for head, values in found.items()}


def within_layers(score: list[float], rises: list[float], layers: list[int]) -> tuple[float, float]:
    """Spearman's and Kendall's correlations within layers, by the definitions of docs/results.md."""
    ranks: list[NDArray[np.float64]] = []
    for values in (score, rises):
        own = np.empty(len(values))
        for layer in set(layers):
            here = np.array(layers) == layer
            own[here] = rankdata(np.array(values)[here]) - (here.sum() + 1) / 2
        ranks.append(own)
    pairs = [(i, j) for i, j in combinations(range(len(score)), 2) if layers[i] == layers[j]]
    signs = [np.array([np.sign(values[i] - values[j]) for i, j in pairs]) for values in (score, rises)]
    tau = signs[0] @ signs[1] / math.sqrt((signs[0] ** 2).sum() * (signs[1] ** 2).sum())
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1]), float(tau)


@pytest.mark.parametrize("ablation", ["zero", "mean", "resample"])
@pytest.mark.parametrize("target", ["nll_rise", "drop_pp"])
@pytest.mark.parametrize("score", [GOOD, TIED])
def test_the_correlations_are_scipys_of_masks_csv(run: RunFiles, ablation: str, target: str, score: str) -> None:
    row = one(run, ablation=ablation, target=target, score=score)
    rises = measured(run, ablation, target)
    values = columns()[score]
    assert row["spearman"] == pytest.approx(spearmanr(values, [rises[head] for head in PLACES]).statistic)
    assert row["kendall"] == pytest.approx(kendalltau(values, [rises[head] for head in PLACES]).statistic)


@pytest.mark.parametrize("target", ["nll_rise", "drop_pp"])
@pytest.mark.parametrize("score", [GOOD, TIED])
def test_within_layers_ranks_and_pairs_are_those_of_a_layer(run: RunFiles, target: str, score: str) -> None:
    row = one(run, target=target, score=score, scope="within_layers")
    rises = measured(run, "zero", target)
    wanted = within_layers(columns()[score], [rises[head] for head in PLACES], [layer for layer, _ in PLACES])
    assert (row["spearman"], row["kendall"]) == pytest.approx(wanted)


def test_candidates_are_calibration_scores_judged_descriptions_and_depth(run: RunFiles) -> None:
    rows = [row for row in importance_of(run) if row["ablation"] == "zero" and row["target"] == "nll_rise"]
    found = {(row["score"], row["rows"], row["images_chosen"]) for row in rows}
    judged = {("confidence", "judged", IMAGES), ("sink_mass", "judged", IMAGES)}
    assert found == {(name, "calibration", 31) for name in columns()} | judged | {("depth", "", 0)}
    assert {row["images_judged"] for row in rows} == {IMAGES}
    assert len(rows) == 2 * len(found)


def test_depth_is_the_number_of_the_layer_and_says_nothing_within_layers(run: RunFiles) -> None:
    rises = measured(run, "zero", "nll_rise")
    wanted = spearmanr([layer for layer, _ in PLACES], [rises[head] for head in PLACES]).statistic
    assert one(run, score="depth", rows="")["spearman"] == pytest.approx(wanted)
    assert math.isnan(float(one(run, score="depth", rows="", scope="within_layers")["spearman"]))


def test_heads_without_a_value_are_left_out_of_their_score_alone(run: RunFiles) -> None:
    row = one(run, score=GAPS)
    known = [(head, value) for head, value in zip(PLACES, columns()[GAPS], strict=True) if math.isfinite(value)]
    rises = measured(run, "zero", "nll_rise")
    assert (row["heads"], row["heads_without_score"]) == (5, 2)
    assert row["spearman"] == pytest.approx(
        spearmanr([v for _, v in known], [rises[head] for head, _ in known]).statistic
    )
    assert one(run, score=GOOD)["heads"] == 7


def test_a_head_that_is_alone_in_its_layer_counts_only_among_all(run: RunFiles) -> None:
    row = one(run, score=GAPS, scope="within_layers")  # layer 0 has one value, layer 1 two, layer 2 two
    assert (row["heads"], row["heads_without_score"]) == (4, 2)
    rises = measured(run, "zero", "nll_rise")
    used = [1, 1, 2, 2], [(1, 0), (1, 1), (2, 1), (2, 2)]
    values = dict(zip(PLACES, columns()[GAPS], strict=True))
    wanted = within_layers([values[head] for head in used[1]], [rises[head] for head in used[1]], used[0])
    assert (row["spearman"], row["kendall"]) == pytest.approx(wanted)


@pytest.mark.parametrize(("score", "heads"), [("taylor_zero", 7), ("taylor_mean", 0)])
def test_constant_and_empty_scores_give_no_order(run: RunFiles, score: str, heads: int) -> None:
    row = one(run, score=score)
    assert row["heads"] == heads
    names = ("spearman", "spearman_low", "spearman_high", "kendall", "kendall_low", "kendall_high")
    assert np.isnan([float(row[name]) for name in names]).all()


def test_rows_are_sorted_by_ablation_target_scope_and_strength(run: RunFiles) -> None:
    rows = importance_of(run)
    keys = list(dict.fromkeys((row["ablation"], row["target"], row["scope"]) for row in rows))
    kinds, targets, scopes = ("zero", "mean", "resample"), ("nll_rise", "drop_pp"), ("all", "within_layers")
    assert keys == [(kind, target, scope) for kind in kinds for target in targets for scope in scopes]
    for key in keys:
        own = [float(row["spearman"]) for row in rows if (row["ablation"], row["target"], row["scope"]) == key]
        sizes = [abs(value) if math.isfinite(value) else -1 for value in own]
        assert sizes == sorted(sizes, reverse=True)


def test_heads_without_a_mask_of_their_own_are_counted(tmp_path: Path) -> None:
    run = small_run(tmp_path, ("head:0.1", "head:1.0", "head:2.0", "head:2.2", "layer:1"))
    masked = measured(run, "zero", "nll_rise")
    row = one(run, score=GOOD)
    assert (row["heads"], row["heads_without_mask"]) == (4, 3)
    values = dict(zip(PLACES, columns()[GOOD], strict=True))
    wanted = spearmanr([values[head] for head in masked], list(masked.values())).statistic
    assert row["spearman"] == pytest.approx(wanted)


def test_two_heads_have_no_order(tmp_path: Path) -> None:
    assert importance_of(small_run(tmp_path, ("head:0.1", "head:1.0", "each:layer"))) == []


def test_a_run_without_scores_has_nothing_to_judge(tmp_path: Path) -> None:
    assert importance_of(load_files(write_run(tmp_path, ["each:head"]))) == []


def test_fewer_than_eight_heads_have_no_interval(run: RunFiles) -> None:
    assert math.isnan(float(one(run, score=GOOD)["spearman_low"]))


def test_scores_may_name_heads_in_any_order_and_not_all(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    before = one(run, score=GOOD)
    backwards = {GOOD: columns()[GOOD][::-1]}
    write_scores(tmp_path, backwards, PLACES[::-1])
    assert one(run, score=GOOD) == before
    write_scores(tmp_path, {GOOD: columns()[GOOD][:4]}, PLACES[:4])
    row = one(run, score=GOOD)
    assert (row["heads"], row["heads_without_score"]) == (4, 3)


def test_the_reliability_is_spearman_browns_of_random_halves(run: RunFiles) -> None:
    row = one(run, score=GOOD)
    groups = run.arrays("groups.npz")
    full = groups["images"] > 0
    single = [number for number, own in enumerate(run.masks) if own["ablation"] == "zero"]
    rises = (groups["nll"][single] - groups["nll"][0])[:, full]
    rng = np.random.default_rng(99)  # other halves than ours
    halves = []
    for _ in range(400):
        order = rng.permutation(rises.shape[1])
        one_half, other = (rises[:, part].sum(axis=1) for part in (order[::2], order[1::2]))
        halves.append(spearmanr(one_half, other).statistic)
    half = float(row["split_half"])
    assert half == pytest.approx(np.mean(halves), abs=0.1)
    assert row["reliability"] == pytest.approx(2 * half / (1 + half))
    if half > 0:
        assert row["ceiling"] == pytest.approx(math.sqrt(float(row["reliability"])))
    else:
        assert math.isnan(float(row["ceiling"]))


def test_every_row_says_which_images_chose(tmp_path: Path) -> None:
    data = {"path": "digits", "split": "test", "rows": {"rule": "same", "calibrates": False}}
    rows = importance_of(small_run(tmp_path, data=data, calibration="0" * 64))
    assert {row["calibration"] for row in rows} == {"same"}
    assert "all scores are of the same images as the rises" in printed(rows)


def test_the_table_is_read_as_it_was_written(run: RunFiles) -> None:
    rows = importance_of(run)
    write_rows(run.path / "importance.csv", rows)
    table = run.table("importance.csv")
    assert table is not None
    assert list(table) == list(rows[0])
    for name, values in table.items():
        np.testing.assert_array_equal(values, [row[name] for row in rows], err_msg=name)


def printed(rows: list[Row]) -> str:
    with console.capture() as capture:
        console.print(importance_table(rows))
    return capture.get()


def test_the_printed_table_has_the_best_first_and_says_what_it_leaves_out(run: RunFiles) -> None:
    rows = importance_of(run)
    text = printed(rows)
    lines = text.splitlines()
    assert "7 heads, judged on 40 images" in lines[0]
    assert "the best 5 of 8 scores under each ablation" in text
    best = next(row for row in rows if row["ablation"] == "zero")
    assert lines[2].split()[:2] == ["zero", best["score"]]
    assert f"{float(best['spearman']):+.2f}" in lines[2]
    assert "31 calibration" in text
    assert "40 judged" in text
    assert "judged: of the same images as the rises" in text
    assert max(map(len, lines)) <= 120


def test_figures_show_every_score_against_the_rises_and_all_correlations(run: RunFiles) -> None:
    rows = importance_of(run)
    write_rows(run.path / "importance.csv", rows)
    found = {name: figure for name, figure in run_figures(run) if name.startswith("importance/")}
    assert list(found) == ["importance/scores", "importance/correlations"]
    for figure in found.values():
        assert drawn(figure).misplaced == []
    panel = next(axes for axes in found["importance/scores"].axes if axes.get_title().startswith(GOOD))
    rises = measured(run, "zero", "nll_rise")
    dots = np.asarray(panel.collections[0].get_offsets())
    np.testing.assert_allclose(
        dots, [[value, rises[head]] for head, value in zip(PLACES, columns()[GOOD], strict=True)]
    )
    assert f"{float(one(run, score=GOOD)['spearman']):+.2f}" in panel.get_title()
    said = texts(found["importance/correlations"])
    assert {GOOD, "confidence", "depth"} <= set(said)
    assert any("Not shown" in text and "taylor_zero" in text for text in said)


def test_a_run_whose_calibration_left_scores_judges_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain: Callable[..., None] = write_masks
    heads = [(layer, head) for layer in range(6) for head in range(4)]
    rng = np.random.default_rng(0)

    def with_scores(path: Path, *args: Any) -> None:
        plain(path, *args)
        write_scores(path.parent, {GOOD: rng.exponential(size=24).tolist()}, heads)

    monkeypatch.setattr(results, "write_masks", with_scores)
    ended = command(tmp_path, "test", "--mask-spec", "each:head", "--resume", "never", *QUICK)
    assert ended.code == 0, ended.err
    run = load_files(ended.directory())
    table = run.table("importance.csv")
    assert table is not None
    np.testing.assert_array_equal(table["spearman"], [row["spearman"] for row in importance_of(run)])
    assert "which score of a head predicts the NLL rise without it: 24 heads, judged on 40 images" in ended.out
    pictures = {file.name for file in (run.path / "figures").iterdir()}
    assert {"importance_scores.png", "importance_correlations.png"} <= pictures
