import re
from pathlib import Path
from typing import Any

import pytest

from headprobe.masks import MaskSpec, MaskSpecError
from headprobe.masks.spec import expand_all
from headprobe.masks.tables import NO_ORDER
from headprobe.run.results import SCORE_COLUMNS

SHAPE = (1, 2)
HEADS = """layer,head,entropy_nats,note
0,0,2.5,x
1,0,1.5,
1,1,-3e0,y
"""
MASKS = """mask,ablation,drop_pp
none,zero,
layer:1,zero,9
head:1.1,zero,0.5
head:0.0,zero,0.5
head:1.0,zero,-0.25
"""


def order(path: Path, rest: str) -> list[tuple[int, int]]:
    """Heads in the order in which nested masks add them."""
    masks = MaskSpec(f"grow:{path}:{rest}").expand(SHAPE, "tiny")
    seen: set[tuple[int, int]] = set()
    added = []
    for mask in masks:
        (new,) = mask.mask.masked - seen
        added.append(new)
        seen |= mask.mask.masked
    return added


def refuse(path: Path, rest: str) -> tuple[str, str]:
    """The reason, and the user's text from the caret on."""
    with pytest.raises(MaskSpecError) as error:
        MaskSpec(f"grow:{path}:{rest}").expand(SHAPE, "tiny")
    return error.value.reason, error.value.spec[error.value.column :]


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text, "utf-8")
    return folder / name


@pytest.mark.parametrize(
    ("rest", "heads"),
    [
        ("entropy_nats", [(1, 1), (1, 0), (0, 0)]),
        ("entropy_nats:least", [(1, 1), (1, 0), (0, 0)]),
        ("entropy_nats:most", [(0, 0), (1, 0), (1, 1)]),
        ("layer:most", [(1, 0), (1, 1), (0, 0)]),
    ],
)
def test_masks_grow_by_a_column_of_heads_csv(tmp_path: Path, rest: str, heads: list[tuple[int, int]]) -> None:
    assert order(write(tmp_path, "heads.csv", HEADS), rest) == heads


@pytest.mark.parametrize(
    ("rest", "heads"),
    [("drop_pp", [(1, 0), (0, 0), (1, 1)]), ("drop_pp:most", [(0, 0), (1, 1), (1, 0)])],
)
def test_masks_grow_by_the_single_heads_of_masks_csv_and_ties_go_by_layer_and_head(
    tmp_path: Path, rest: str, heads: list[tuple[int, int]]
) -> None:
    assert order(write(tmp_path, "masks.csv", MASKS), rest) == heads


def test_a_runs_folder_gives_the_table_that_has_the_column_heads_csv_first(tmp_path: Path) -> None:
    write(tmp_path, "masks.csv", MASKS.replace("ablation", "entropy_nats"))
    write(tmp_path, "heads.csv", HEADS)
    assert order(tmp_path, "entropy_nats") == [(1, 1), (1, 0), (0, 0)]
    assert order(tmp_path, "drop_pp") == [(1, 0), (0, 0), (1, 1)]


def test_only_the_baselines_rows_count_where_a_table_of_heads_has_masks(tmp_path: Path) -> None:
    rows = "mask,layer,head,x\nnone,0,0,1\nall,0,0,9\nnone,1,0,3\nnone,1,1,2\nall,1,1,0\n"
    assert order(write(tmp_path, "heads.csv", rows), "x") == [(0, 0), (1, 1), (1, 0)]


def test_masks_grow_by_the_change_that_one_mask_makes(tmp_path: Path) -> None:
    rows = "mask,layer,head,x\nlayer:1,0,0,0.5\nlayer:1,1,0,-2\nlayer:1,1,1,0.1\n"
    path = write(tmp_path, "heads_change.csv", rows)
    assert order(path, "x") == [(1, 0), (1, 1), (0, 0)]
    assert order(path, "x:most") == [(0, 0), (1, 1), (1, 0)]


@pytest.mark.parametrize("direction", ["", ":least", ":most"])
@pytest.mark.parametrize(
    ("column", "reason"),
    [
        ("top1", "top1 is large where a head does not matter, .*: order by drop_pp, .* got top1"),
        ("top1_count", "order by drop_pp, .* got top1_count"),
        ("top5", "order by drop_pp or nll_rise, got top5"),
        ("top5_count", "order by drop_pp or nll_rise, got top5_count"),
        ("agreement", "order by kl_nats, got agreement"),
        ("wrong_to_right", "large where masking a head helps: order by drop_pp, .* got wrong_to_right"),
        ("mcnemar_p", "says how sure a change is, .*: order by drop_pp or nll_rise, got mcnemar_p"),
        ("bh_q", "says how sure a change is, .*: order by drop_pp or nll_rise, got bh_q"),
        ("log_e_value", "says how sure a change is, .*: order by drop_pp or nll_rise, got log_e_value"),
        ("e_bh_q", "says how sure a change is, .*: order by drop_pp or nll_rise, got e_bh_q"),
        ("images", "does not differ between heads: order by drop_pp or nll_rise, got images"),
        ("heads_masked", "does not differ between heads: .* got heads_masked"),
    ],
)
def test_a_column_of_masks_csv_whose_order_would_mislead_is_refused_with_another(
    tmp_path: Path, column: str, direction: str, reason: str
) -> None:
    path = write(tmp_path, "masks.csv", MASKS.replace("drop_pp", column))
    got, culprit = refuse(path, column + direction)
    assert re.search(reason, got)
    assert culprit == column + direction


def test_a_statistic_of_heads_may_have_any_name(tmp_path: Path) -> None:
    path = write(tmp_path, "heads.csv", HEADS.replace("entropy_nats", "agreement"))
    assert order(path, "agreement") == [(1, 1), (1, 0), (0, 0)]


def test_every_column_of_masks_csv_orders_heads_or_is_refused() -> None:
    # Of the columns that order, a larger value means that the head matters more.
    ordered = {"nll", "drop_pp", "drop_low_pp", "drop_high_pp", "right_to_wrong", "kl_nats", "nonfinite"}
    ordered |= {"nll_rise", "nll_rise_low", "nll_rise_high"}
    names = {"mask", "ablation", "test_family"}  # no numbers
    assert ordered | NO_ORDER.keys() | names == {*SCORE_COLUMNS, "heads_masked", "draw", "bh_q", "e_bh_q"} | names


def test_a_byte_order_mark_and_crlf_are_read(tmp_path: Path) -> None:
    path = tmp_path / "heads.csv"
    path.write_bytes(b"\xef\xbb\xbf" + HEADS.replace("\n", "\r\n").encode())
    assert order(path, "entropy_nats") == [(1, 1), (1, 0), (0, 0)]


def test_nested_masks_have_names_and_are_one_test_family(tmp_path: Path) -> None:
    path = write(tmp_path, "heads.csv", HEADS)
    masks = MaskSpec(f"grow:{path}:entropy_nats").expand(SHAPE, "tiny")
    assert [mask.name for mask in masks] == [f"grow:{path}:entropy_nats:least:{count}" for count in (1, 2, 3)]
    assert {mask.test_families for mask in masks} == {(f"grow:{path}:entropy_nats:least",)}
    assert [(mask.curve, mask.step) for mask in masks] == [("grow_entropy_nats_least", count) for count in (1, 2, 3)]


def test_orders_by_the_same_column_of_two_tables_are_two_curves(tmp_path: Path) -> None:
    for folder in ("a-b", "a_b", "c"):
        (tmp_path / folder).mkdir()
    one, alike, other = (write(tmp_path / folder, "heads.csv", HEADS) for folder in ("a-b", "a_b", "c"))
    specs = [MaskSpec(f"grow:{path}:entropy_nats") for path in (one, alike, other)]
    curves = {
        str(path): {variant.mask.curve for variant in expand_all(specs, SHAPE, "tiny") if f"{path}:" in variant.name}
        for path in (one, alike, other)
    }
    assert all(len(own) == 1 for own in curves.values())
    assert len(set.union(*curves.values())) == 3
    assert all(name.startswith("grow_entropy_nats_least_") for own in curves.values() for name in own)
    assert {variant.mask.curve for variant in expand_all(specs[:1], SHAPE, "tiny")} == {"grow_entropy_nats_least"}
    both = expand_all([specs[0], MaskSpec("head:0.0+head:1.0"), MaskSpec("random:2:0")], SHAPE, "tiny")
    assert {variant.mask.curve for variant in both} == {"grow_entropy_nats_least", "heads_masked", "random_seed_0"}


def test_each_name_expands_to_its_own_mask_again(tmp_path: Path) -> None:
    path = write(tmp_path, "heads.csv", HEADS)
    for mask in MaskSpec(f"keep:grow:{path}:entropy_nats:most+layer:0").expand(SHAPE, "tiny"):
        (again,) = MaskSpec(mask.name).expand(SHAPE, "tiny")
        assert (again.name, again.mask) == (mask.name, mask.mask)


def test_counts_thin_the_nested_masks(tmp_path: Path) -> None:
    path = write(tmp_path, "heads.csv", HEADS)
    masks = MaskSpec(f"grow:{path}:entropy_nats:most:0-3/2").expand(SHAPE, "tiny")
    assert [mask.mask.masked for mask in masks] == [frozenset(), {(0, 0), (1, 0)}]


def test_a_single_count_is_a_single_mask(tmp_path: Path) -> None:
    (mask,) = MaskSpec(f"grow:{write(tmp_path, 'heads.csv', HEADS)}:entropy_nats:least:2").expand(SHAPE, "tiny")
    assert mask.mask.masked == {(1, 1), (1, 0)}
    assert mask.test_families == ()


def test_counts_beyond_the_model_are_refused(tmp_path: Path) -> None:
    reason, culprit = refuse(write(tmp_path, "heads.csv", HEADS), "entropy_nats:least:1-4")
    assert reason == "tiny has 3 heads: expected 0 to 3 of them, got 4"
    assert culprit == "4"


def test_a_missing_column_lists_those_there_are(tmp_path: Path) -> None:
    write(tmp_path, "heads.csv", HEADS)
    write(tmp_path, "masks.csv", MASKS)
    reason, culprit = refuse(tmp_path, "entropy")
    assert f"{tmp_path}/heads.csv has layer, head, entropy_nats, note" in reason
    assert f"{tmp_path}/masks.csv has mask, ablation, drop_pp" in reason
    assert reason.endswith("got entropy")
    assert culprit == "entropy"


@pytest.mark.parametrize(
    ("text", "column", "reason", "culprit"),
    [
        (HEADS, "note", "row 2: expected a finite number in 'note' for head:0.0, got 'x'", "note"),
        (HEADS.replace("1.5", ""), "entropy_nats", "row 3: expected a finite number", "entropy_nats"),
        (HEADS.replace("1.5", "nan"), "entropy_nats", "for head:1.0, got 'nan'", "entropy_nats"),
        (HEADS.replace("1.5", "inf"), "entropy_nats", "for head:1.0, got 'inf'", "entropy_nats"),
        ("layer,head,x\n0,0", "x", "for head:0.0, got None", "x"),
        (HEADS.replace("1,0,1.5,\n", ""), "entropy_nats", "lacks 1 of the 3 heads of tiny, got no head:1.0", "PATH"),
        ("layer,head,x\n", "x", "lacks 3 of the 3 heads of tiny, got no head:0.0, head:1.0, head:1.1", "PATH"),
        (HEADS + "1,2,3,\n", "entropy_nats", "row 5: tiny has no head:1.2: take a run of the same model", "PATH"),
        (
            HEADS + "1,1,3,\n",
            "entropy_nats",
            "row 5: expected one row per head, so a table of one ablation and one draw",
            "PATH",
        ),
        (
            HEADS + "1,1.0,3,\n",
            "entropy_nats",
            "row 5: expected whole numbers for 'layer' and 'head', got '1' and '1.0'",
            "PATH",
        ),
        (HEADS + ",1,3,\n", "entropy_nats", "got '' and '1'", "PATH"),
        ("a,b\n1,2\n", "b", "expected columns 'layer' and 'head', or 'mask'", "PATH"),
        ("", "b", "has no columns, got b", "b"),
        ("mask,layer,head,x\nall,0,0,1\n", "x", "lacks 2 of the 3 heads", "PATH"),
        (
            "mask,layer,head,x\nall,0,0,1\nlayer:1,0,0,1\n",
            "x",
            "expected rows of the baseline, none, or of one mask, got all, layer:1",
            "PATH",
        ),
        ('layer,head,x\n0,0,"1', "x", "expected a CSV table", "PATH"),
    ],
)
def test_a_table_that_gives_no_order_is_refused_with_row_and_head(
    tmp_path: Path, text: str, column: str, reason: str, culprit: str
) -> None:
    path = write(tmp_path, "table.csv", text)
    got, shown = refuse(path, column)
    assert reason in got
    assert shown == (f"{path}:{column}" if culprit == "PATH" else culprit)


def test_a_path_without_a_table_is_refused(tmp_path: Path) -> None:
    assert "cannot read the table: No such file or directory" in refuse(tmp_path / "no.csv", "x")[0]
    assert "expected a run's folder with scores.csv, heads.csv or masks.csv" in refuse(tmp_path, "x")[0]
    (tmp_path / "binary.csv").write_bytes(b"\x80\x81")
    assert "expected a CSV table" in refuse(tmp_path / "binary.csv", "x")[0]


def test_an_order_that_is_scored_anew_has_a_name_and_a_curve_of_its_own() -> None:
    spec = MaskSpec("grow:calibration:stable_rank:most:rescored:2-4/2")
    assert spec.canonical == "grow:calibration:stable_rank:most:rescored:2,4"
    assert spec.needs_scores
    scores = {"stable_rank": {(layer, head): float(head) for layer in range(2) for head in range(3)}}
    order = [(1, 2), (0, 0), (1, 1), (0, 2)]
    masks = spec.expand([3, 3], "m", scores, {("stable_rank", "most"): order})
    assert [mask.name.rpartition(":")[2] for mask in masks] == ["2", "4"]
    assert [mask.mask.masked for mask in masks] == [frozenset(order[:2]), frozenset(order)]
    assert {mask.curve for mask in masks} == {"grow_stable_rank_most_rescored"}
    assert MaskSpec(masks[0].name).expand([3, 3], "m", scores, {("stable_rank", "most"): order}) != []


@pytest.mark.parametrize(
    "orders",
    [
        {},
        {("stable_rank", "least"): [(0, 0), (0, 1), (0, 2), (1, 0)]},
        {("stable_rank", "most"): [(0, 0), (0, 1), (0, 2)]},
        {("stable_rank", "most"): [(0, 0), (0, 1), (0, 2), (0, 2)]},
        {("stable_rank", "most"): [(0, 0), (0, 1), (0, 2), (7, 0)]},
    ],
)
def test_a_calibration_that_did_not_score_so_far_anew_masks_nothing(orders: Any) -> None:
    scores = {"stable_rank": {(layer, head): 0.0 for layer in range(2) for head in range(3)}}
    spec = MaskSpec("grow:calibration:stable_rank:most:rescored:4")
    with pytest.raises(MaskSpecError, match="where the masks need 4: run it anew without --calibration-file"):
        spec.expand([3, 3], "m", scores, orders)
