import io

import numpy as np
import pytest
from rich.console import Console

from headprobe.report.table import MOST_ROWS, masks_table
from headprobe.run.load import Row


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
