import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from headprobe.report.table import MOST_ROWS, agreement_table, index_table, masks_table, orders_table
from headprobe.run.index_null import null_rows
from headprobe.run.load import Row, load_files
from headprobe.run.order_areas import order_rows
from tests.run.small_runs import write_run


def row(name: str, drop: float, family: str = "each:head", ablation: str = "zero", draw: int = 0) -> Row:
    numbers = {"top1": 0.79, "top5": 0.95, "nll": 0.9685, "drop_pp": drop, "drop_low_pp": drop - 1}
    return {
        "mask": name,
        "ablation": "none" if name == "none" else ablation,
        "draw": draw,
        "test_family": family,
        "heads_masked": 3,
        "images": 500,
        "drop_high_pp": drop + 1,
        "mcnemar_p": 3e-6 if drop else np.nan,
        "bh_q": 0.03 if family else np.nan,
        **numbers,
    }


def printed(rows: list[Row], width: int) -> str:
    out = io.StringIO()
    Console(file=out, width=width, highlight=False).print(masks_table(rows, "some_model", width))
    return out.getvalue()


def test_a_wide_terminal_shows_every_column() -> None:
    text = printed([row("none", 0), row("head:3.1", 2.5)], 120)
    for part in (
        "top-1 %",
        "top-5 %",
        "79.00",
        "95.00",
        "0.9685",
        "+2.50 [+1.50, +3.50]",
        "3e-06",
        "0.030",
        "500 images",
    ):
        assert part in text


@pytest.mark.parametrize("width", [80, 120])
def test_a_masks_name_is_never_cut(width: int) -> None:
    name = "one-per-layer:13:0-11"
    text = printed([row("none", 0), row(name, 2.5)], width)
    assert name in text
    assert "…" not in text


def test_a_terminal_too_narrow_for_a_name_folds_it() -> None:
    lines = printed([row("none", 0), row("keep:layer:0-11+head:10.1", 2.5)], 70).splitlines()
    folded = "".join(line[:16].strip() for line in lines[3:])
    assert "keep:layer:0-11+head:10.1" in folded


def test_without_a_sweep_there_is_no_q() -> None:
    assert "q (BH)" not in printed([row("none", 0, ""), row("layer:3", 1.0, "")], 120)


@pytest.mark.parametrize(("images", "said"), [(199, True), (200, False)])
def test_few_images_are_said_to_make_the_nll_uncertain(images: int, said: bool) -> None:
    text = printed([row("none", 0) | {"images": images}, row("layer:3", 1.0) | {"images": images}], 120)
    assert ("under 200 images the intervals of nll_rise may be too narrow" in text) == said


def test_a_p_that_a_float_rounds_to_0_is_shown_as_below_the_smallest() -> None:
    assert "<1e-300" in printed([row("none", 0), row("all", 88.0) | {"mcnemar_p": 0.0}], 120)


def test_of_many_masks_the_largest_drops_are_shown_and_the_title_says_so() -> None:
    rows = [row("none", 0), *(row(f"head:0.{number}", number / 10) for number in range(1, 100))]
    text = printed(rows, 120)
    assert f"the {MOST_ROWS - 1} largest drops of 99 masks" in text
    assert "head:0.99" in text
    assert "head:0.60 " not in text


def test_the_ablation_is_shown_where_there_is_another_than_zero() -> None:
    assert "ablation" not in printed([row("none", 0), row("layer:3", 1.0)], 120)
    lines = printed([row("none", 0), row("layer:3", 1.0), row("layer:3", 0.5, ablation="mean")], 120).splitlines()
    assert lines[1].split()[:2] == ["mask", "ablation"]
    assert [line.split()[:2] for line in lines[3:5]] == [["layer:3", "zero"], ["layer:3", "mean"]]


def test_of_many_masks_all_ablations_of_the_worst_are_shown() -> None:
    kinds = ("zero", "mean", "linear")
    masks = range(1, 30)
    rows = [row("none", 0)]
    rows += [
        row(f"head:0.{mask}", mask / 10 if kind == "mean" else 0, ablation=kind) for mask in masks for kind in kinds
    ]
    lines = printed(rows, 120).splitlines()
    assert "the 13 largest drops of 29 masks under any ablation" in lines[0]
    shown = [tuple(line.split()[:2]) for line in lines if line.startswith("head:")]
    assert shown == [(f"head:0.{mask}", kind) for mask in range(29, 16, -1) for kind in kinds]


def test_a_mask_has_one_line_for_all_draws_with_their_spread() -> None:
    drops = [1.0, 2.0, 4.5]
    draws = [row("layer:3", drop, ablation="resample", draw=draw) for draw, drop in enumerate(drops)]
    text = printed([row("none", 0), row("layer:3", 1.5), *draws], 120)
    assert text.count("resample") == 1
    assert "+1.00 [+0.00, +2.00]" in text
    assert f"+2.50 ± {np.std(drops, ddof=1):.2f} (3)" in text
    assert "drop of draws: mean and standard deviation over draws; all else is of draw 0" in text


@pytest.mark.parametrize(("rule", "said"), [("same", True), ("half", False), ("", False)])
def test_the_title_flags_images_that_judge_what_they_fitted(rule: str, said: bool) -> None:
    rows = [row("none", 0), row("layer:3", 1.0, ablation="mean") | {"calibration": rule}]
    title = masks_table(rows, "some_model", 120).title
    assert ("judged on the images that fitted the constants" in str(title)) == said


def test_each_two_ablations_have_a_line() -> None:
    cells: Row = {"masks": 24, "sum_a": 0.7, "sum_b": 0.8}
    cells |= {"spearman": 0.9, "spearman_low": 0.5, "spearman_high": 0.95}
    cells |= {"b_minus_a": 0.1, "b_minus_a_low": -0.02, "b_minus_a_high": 0.22}
    key: Row = {"test_family": "each:head", "ablation_a": "zero", "ablation_b": "mean"}
    small = cells | {"spearman_low": np.nan, "spearman_high": np.nan}
    rows = [
        {**key, "quantity": "nll_rise", **cells},
        {**key, "quantity": "drop_pp", **cells},
        {**key, "quantity": "nll_rise", **small},
    ]
    out = io.StringIO()
    Console(file=out, width=120, highlight=False).print(agreement_table(rows))
    first, second = out.getvalue().splitlines()[2:]
    assert first.split("  ")[0] == "zero, mean"
    for part in ("24 of each:head", "+0.90 [+0.50, +0.95]", "0.700, 0.800", "+0.100 [-0.020, +0.220]"):
        assert part in first
    assert "+0.90  " in second
    assert "+0.50" not in second


def of(table: Table) -> str:
    out = io.StringIO()
    Console(file=out, width=130, highlight=False).print(table)
    return out.getvalue()


def test_orders_have_a_line_each_and_random_ones_one_for_their_mean(tmp_path: Path) -> None:
    run = load_files(write_run(tmp_path, ["grow:random:0-9", "layer:0+grow:random:1"]))
    lines = of(orders_table(order_rows(run))).splitlines()
    assert [line.split("  ")[0].strip() for line in lines[2:]] == ["random, mean of 10", "layer_0_random_seed_1"]
    assert "ablation" not in lines[1]
    row = next(row for row in order_rows(run) if row["order"] == "random")
    assert f"{row['area']:.4f} [" in lines[2]
    assert f"{row['removable_5pp']} ({row['removable_5pp_surely']})" in lines[2]


def test_indices_have_a_line_for_each_quantity_and_the_smallest_p_is_said(tmp_path: Path) -> None:
    run = load_files(write_run(tmp_path, ["each:index", "one-per-layer:0-98", "one-per-layer:0-9:2"]))
    said = of(index_table(null_rows(run), 3))
    assert sum(line.startswith("index:") for line in said.splitlines()) == 6
    assert "smallest p that so many draws allow: 0.020; a single index out of 2 can have q 0.040" in said
    assert "no p with fewer than 99 draws; add one-per-layer:0-98:2 to the mask specs" in said
