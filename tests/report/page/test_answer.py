"""Every number of every sentence is recomputed from the CSV files by `answer_oracle`, for runs of all kinds."""

import math
import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headprobe.callbacks.derived import write_derived
from headprobe.report.page.answer import Sentence, answer
from headprobe.report.page.answers.wording import Draft
from headprobe.run.load import Row, load_files, read_files
from headprobe.run.results import write_arrays, write_rows
from tests.report.page.answer_oracle import expected, lines, power
from tests.run.small_runs import HEADS, IMAGES, write_heads, write_run

PLACES = [(layer, head) for layer, count in enumerate(HEADS) for head in range(count)]
EVERYTHING = ("each:head", "each:layer", "each:index", "each:pair", "grow:random:0-9", "one-per-layer:0-98")
HALF = {
    "calibration": "0f",
    "calibration_images": 31,
    "data": {"path": "digits", "split": "test", "rows": {"rule": "half"}},
}
KINDS: dict[str, tuple[Sequence[str], Sequence[str], dict[str, Any]]] = {
    "no mask": ((), ("zero",), {}),
    "one mask": (("layer:1",), ("zero",), {}),
    "a mask of one head": (("head:2.1",), ("mean",), HALF),
    "some masks": (("layer:1", "index:0", "random:3:0-3"), ("zero",), {}),
    "layers": (("each:layer",), ("zero",), {}),
    "named layers": (("layer:0", "layer:1"), ("zero",), {}),
    "heads": (("each:head",), ("mean",), HALF),
    "several ablations": (("each:head", "each:layer"), ("zero", "mean", "linear"), HALF),
    "draws": (("each:head", "each:layer", "grow:random:0-9"), ("resample:3",), {}),
    "everything": (EVERYTHING, ("zero", "linear"), HALF),
    "few random orders": (("grow:random:0-2",), ("zero",), {}),
    "too few draws": (("each:index", "one-per-layer:0-4"), ("zero",), {}),
    "subsets": (("subsets:layer",), ("zero",), {}),
}


def matches(shown: str, value: float) -> bool:
    """Whether a number in a text is this value, rounded to the digits that the text has."""
    bare = shown.replace(MINUS, "-").rstrip("%").replace(",", "")
    decimals = len(bare.partition("e")[0].partition(".")[2]) - int(bare.partition("e")[2] or 0)
    return abs(float(bare) - value * (100 if shown.endswith("%") else 1)) <= 0.5000001 * 10.0**-decimals


MINUS = "\u2212"

CONSTANT = {"95%", "80%", "0.05", "0.001", "0", "1"}
"""Numbers of the text itself: confidence, power, levels, `holds 0`, `1 point`."""

NAMES = re.compile(r"\S+:[\d.,:+/-]*\d|(?<=head )\d+\.\d+")
"""Masks and heads, which are named by numbers."""


def numerals(text: str) -> list[str]:
    return re.findall(
        r"(?<![\w.:-])[+-]?\d[\d,]*(?:\.\d+)?(?:e[-+]\d+)?%?(?!\w)", NAMES.sub("", text).replace(MINUS, "-")
    )


def check_text(sentence: Sentence) -> None:
    """Every number in the text is one of the sentence's, and every one of the sentence's is in the text."""
    shown = [one.rstrip(",") for one in numerals(sentence.text)]
    finite = [value for value in sentence.numbers.values() if math.isfinite(value)]
    for one in shown:
        assert one in CONSTANT or any(matches(one, value) for value in finite), (one, sentence)
    for name, value in sentence.numbers.items():
        if value != 0 and math.isfinite(value) and not ("0.001" in sentence.text and value < 0.001):
            assert any(matches(one, value) for one in shown), (name, value, sentence)
    assert "{" not in sentence.text
    assert "nan" not in sentence.text.split()


def check(folder: Path) -> dict[str, Sentence]:
    """Compare all sentences of a run with the oracle, and return them."""
    said = {sentence.key: sentence for sentence in answer(load_files(folder))}
    wanted = expected(folder)
    assert said.keys() == wanted.keys()
    for key, sentence in said.items():
        numbers = dict(sentence.numbers)
        if "resolvable" in numbers:
            found = power(int(numbers["images"]), numbers.pop("resolvable") / 100, numbers["churn"])
            assert found == pytest.approx(0.8, abs=1e-4), key
            wanted[key].pop("resolvable")
        assert numbers.keys() == wanted[key].keys(), key
        for name, value in numbers.items():
            assert value == pytest.approx(wanted[key][name], rel=1e-9, abs=1e-9), (key, name)
        check_text(sentence)
    return said


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_is_the_oracles(kind: str, tmp_path: Path) -> None:
    specs, ablations, record = KINDS[kind]
    check(write_run(tmp_path, specs, ablations, **record))


# -- heads that are described and scored --


def describe(folder: Path, empty_layer: int | None = None) -> None:
    """Write `heads.csv`, `spectrum.csv` and `similarity.npz` of random numbers; one layer may have no attention."""
    rng = np.random.default_rng(5)
    columns = {name: rng.uniform(1, 20, len(PLACES)) for name in ("attention_distance_px", "attention_distance_px_se")}
    columns |= {name: rng.uniform(0, 1, len(PLACES)) for name in ("attention_distance_ratio", "entropy_ratio")}
    gone = np.array([layer == empty_layer for layer, _ in PLACES])
    write_heads(folder, {name: np.where(gone, np.nan, values) for name, values in columns.items()})
    points: list[Row] = []
    for layer, series, frequency in product(range(len(HEADS)), ("stream_before", "stream_after"), (0.5, 0.25, 1.0)):
        point: Row = {"mask": "none", "layer": layer, "series": series, "head": -1, "profile": "diagonal"}
        point |= {"frequency": frequency, "images": IMAGES, "log_amplitude": 0.0}
        points.append(point | {"delta_log_amplitude": float(rng.normal()), "delta_se": 0.1})
    write_rows(folder / "spectrum.csv", points)
    write_arrays(folder / "similarity.npz", similarities(rng))


def similarities(rng: np.random.Generator) -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
    """Symmetric matrices with ones on the diagonal, NaN between layers."""
    layer = np.array([layer for layer, _ in PLACES])
    arrays = {"layer": layer, "head": np.array([head for _, head in PLACES])}
    for name in ("svcca", "cka", "cka_floor", "cka_low", "cka_high"):
        matrix = rng.uniform(0, 1, (len(layer), len(layer)))
        matrix = np.where(layer[:, None] == layer, (matrix + matrix.T) / 2, np.nan)
        np.fill_diagonal(matrix, 1)
        arrays[name] = matrix
    return arrays


def score(folder: Path) -> None:
    rng = np.random.default_rng(3)
    places: list[Row] = [{"layer": layer, "head": head, "images": 31} for layer, head in PLACES]
    names = ("gradient_abs", "stable_rank")
    write_rows(folder / "scores.csv", [place | {name: float(rng.exponential()) for name in names} for place in places])


@pytest.mark.parametrize("empty_layer", [None, 0, 2])
def test_sentences_about_described_heads_are_the_oracles(empty_layer: int | None, tmp_path: Path) -> None:
    describe(write_run(tmp_path, ["each:head"]), empty_layer)
    said = check(tmp_path)
    assert said.keys() >= {"distance", "entropy", "frequencies", "similarity"}
    first = 1 if empty_layer == 0 else 0
    assert f"In layer {first} " in said["distance"].text


def test_scores_and_sets_in_their_order_are_the_oracles(tmp_path: Path) -> None:
    score(write_run(tmp_path / "earlier", ["each:head"]))
    orders = [f"grow:{tmp_path}/earlier:{name}:least:1-7" for name in ("gradient_abs", "stable_rank")]
    folder = write_run(tmp_path / "run", ["each:head", *orders, "grow:random:0-9"], ("zero", "linear"), **HALF)
    score(folder)
    describe(folder)
    for _ in write_derived(read_files(folder)):
        pass
    said = check(folder)
    best = max(
        (row for row in lines(folder, "orders.csv") if (row["ablation"], row["order"][:4]) == ("linear", "grow")),
        key=lambda row: float(row["area"]),
    )
    column = best["order"].removeprefix("grow_").removesuffix("_least")
    assert said["removable"].text.startswith(f"Removed least {column} first (replaced by a linear prediction")
    assert "Of 2 orders by scores, this has the largest area" in said["removable"].text
    assert "The best was picked on the judged images, which flatters it." in said["removable"].text
    assert "Under zero ablation" in said["scores"].text
    assert "Under linear ablation" in said["scores"].text


@pytest.mark.parametrize(("rule", "flatters"), [("half", 0), ("same", 3)])
def test_what_was_chosen_on_the_judged_images_is_said_to_be_flattered(rule: str, flatters: int, tmp_path: Path) -> None:
    score(write_run(tmp_path / "earlier", ["each:head"]))
    record = HALF | {"data": {"path": "digits", "split": "test", "rows": {"rule": rule}}}
    order = f"grow:{tmp_path}/earlier:gradient_abs:least:1-7"
    folder = write_run(tmp_path / "run", ["each:head", order], ("zero", "linear"), **record)
    score(folder)
    for _ in write_derived(read_files(folder)):
        pass
    texts = [sentence.text for sentence in check(folder).values()]
    assert sum("fitted or chosen on the images that judge it" in text for text in texts) == flatters


# -- what is named, and what is said where there is nothing to name --


def test_the_five_costliest_heads_are_named_in_their_order(tmp_path: Path) -> None:
    text = check(write_run(tmp_path, ["each:head"]))["heads"].text
    rows = sorted(lines(tmp_path, "masks.csv")[1:], key=lambda row: -float(row["nll_rise"]))
    assert re.findall(r"head (\d\.\d) by", text) == [row["mask"].removeprefix("head:") for row in rows[:5]]


@pytest.mark.parametrize("specs", [["layer:1"], ["random:2:0-2"], ["each:head", "each:layer"]])
def test_no_sentence_begins_with_a_small_letter(specs: list[str], tmp_path: Path) -> None:
    said = check(write_run(tmp_path, specs))
    assert ("masks" in said) == (len(specs) == 1)
    assert [one.text for one in said.values() if one.text[0].islower()] == []


def test_where_nothing_is_significant_the_text_says_what_the_images_could_find(tmp_path: Path) -> None:
    said = check(write_run(tmp_path, ["each:head", "each:layer"]))
    rows = lines(tmp_path, "masks.csv")[1:]
    assert min(float(row["bh_q"]) for row in rows) > 0.05  # answers are random, the model's and the masked ones
    for key, noun in (("layers", "3 layers"), ("heads_tested", "7 heads")):
        assert f"None of {noun} differs measurably from the whole model" in said[key].text
    text = " ".join(sentence.text for sentence in said.values())
    assert text.count("a single test finds true drops from") == 1
    assert text.count("corrected for the number of masks tested together") == 1
    assert "are too few to call any of 7 heads useless, or to rule it out" in said["useless"].text


def change(folder: Path, mask: str, **cells: str) -> None:
    """Replace cells of `masks.csv` by hand."""
    rows = lines(folder, "masks.csv")
    write_rows(folder / "masks.csv", [row | cells if row["mask"] == mask else row for row in rows])


@pytest.mark.parametrize("q", ["0.01", "0.04999", "0.05"])
def test_a_mask_is_significant_below_a_q_of_5_percent(q: str, tmp_path: Path) -> None:
    change(write_run(tmp_path, ["each:head"]), "head:1.1", bh_q=q)
    text = check(tmp_path)["heads_tested"].text
    assert ("1 of 7 heads differs from" in text) == (q != "0.05")
    assert ("None of 7 heads differs" in text) == (q == "0.05")


def test_on_many_images_a_head_may_surely_cost_little(tmp_path: Path) -> None:
    write_run(tmp_path, ["each:head"])
    rows = lines(tmp_path, "masks.csv")
    many = {"images": "20000", "top1_count": "15000", "top1": "0.75", "right_to_wrong": "60", "wrong_to_right": "50"}
    rows = [row | many | ({} if row["mask"] == "none" else {"drop_pp": "0.05"}) for row in rows]
    write_rows(tmp_path / "masks.csv", rows)
    for mask in ("head:0.0", "head:0.1"):
        change(tmp_path, mask, drop_low_pp="-0.9", drop_high_pp="1.0")
    said = {sentence.key: sentence for sentence in answer(load_files(tmp_path))}
    assert "For 2 of 7 heads the whole 95% interval of the drop lies within 1 point of no drop" in said["useless"].text
    assert "too few" not in said["useless"].text
    assert "top-1 accuracy 75.00%" in said["baseline"].text  # two decimals from 5,000 images on


def test_heads_without_a_finite_rise_are_counted_and_not_ranked(tmp_path: Path) -> None:
    write_run(tmp_path, ["each:head"])
    empty = {"nll": "", "nll_rise": "", "nll_rise_low": "", "nll_rise_high": ""}
    change(tmp_path, "head:0.0", **empty, nonfinite="40")
    change(tmp_path, "head:2.2", nll="inf", nll_rise="inf", nll_rise_low="", nll_rise_high="", nonfinite="1")
    said = check(tmp_path)
    assert "head 2.2 by infinite nats (no interval)" in said["heads"].text
    assert "1 head of them has no NLL rise" in said["heads"].text
    assert "head 0.0" not in said["heads"].text


def test_where_a_mask_broke_the_model_no_sum_of_its_rises_is_told(tmp_path: Path) -> None:
    write_run(tmp_path, ["each:head"], ("zero", "linear"), **HALF)
    rows = [row | {"sum_b": "", "sum_b_low": "", "sum_b_high": ""} for row in lines(tmp_path, "ablations.csv")]
    write_rows(tmp_path / "ablations.csv", rows)
    said = {sentence.key: sentence for sentence in answer(load_files(tmp_path))}
    assert "linear" not in said
    assert not [one.text for one in said.values() if "not defined" in one.text]


def test_distances_of_one_image_have_no_standard_error(tmp_path: Path) -> None:
    write_run(tmp_path, ["each:head"])
    columns = {name: np.linspace(1, 7, 7) for name in ("attention_distance_px", "attention_distance_ratio")}
    write_heads(tmp_path, columns | {"attention_distance_px_se": np.full(7, np.nan)})
    text = {one.key: one.text for one in answer(load_files(tmp_path))}["distance"]
    assert text.endswith("head 2.2 with 7.0.")


def test_layers_named_one_by_one_have_no_q_and_the_text_says_so(tmp_path: Path) -> None:
    text = check(write_run(tmp_path, ["layer:0", "layer:1"]))["layers"].text
    assert "No q was computed, as the masks were named one by one." in text


def test_a_run_without_images_says_so_alone(tmp_path: Path) -> None:
    write_run(tmp_path, ["each:head"])
    change(tmp_path, "none", images="0", top1_count="0", top1="")
    (only,) = [sentence for sentence in answer(load_files(tmp_path)) if sentence.key == "baseline"]
    assert only.text == "No image of digits (split test) was scored."


def test_names_stand_in_the_text_as_they_are(tmp_path: Path) -> None:
    hostile = "<script>alert('x')</script> \u202eabc {right:count} 🦜"
    data = {"path": hostile, "split": "test"}
    write_run(tmp_path, ["each:layer"], data=data, model={"name": hostile, "heads_per_layer": list(HEADS)})
    text = next(iter(answer(load_files(tmp_path)))).text
    assert f"With all its heads, {hostile} puts" in text
    assert f"of {hostile} (split test)" in text


# -- how numbers are written --


@given(st.floats(-200, 200, allow_nan=False), st.sampled_from(["points", "nats", "ratio", "percent", "px", "change"]))
def test_a_number_is_rounded_to_what_the_text_shows(value: float, form: str) -> None:
    for images in (100, 100_000):
        draft = Draft("any", images).say(f"{{value:{form}}}", value=value)
        text = draft.done().text
        assert matches(text, value)
        assert not re.fullmatch(rf"[-{MINUS}]0[.0]*%?", text)
        assert not text.startswith("-")
        assert draft.done().numbers == {"value": value}


@pytest.mark.parametrize(
    ("value", "text"), [(999_999.0, "999999.000"), (1e6, "1.00e+06"), (-5.908e29, f"{MINUS}5.91e+29")]
)
def test_an_enormous_loss_has_a_power_of_ten(value: float, text: str) -> None:
    assert Draft("any", 100).say("{value:nats}", value=value).done().text == text


@given(st.floats(0, 1))
def test_a_p_is_never_shown_as_0(p: float) -> None:
    text = Draft("any", 100).say("{p:p}", p=p).done().text
    assert text == "below 0.001" if p < 0.001 else matches(text, p)


@given(st.integers(0, 10**7))
def test_counts_have_the_noun_that_goes_with_them(number: int) -> None:
    text = Draft("any", 100).say("{n:count head} {n:differs|differ}", n=number).done().text
    assert text == ("1 head differs" if number == 1 else f"{number:,} heads differ")


def test_an_unknown_form_is_a_mistake_of_ours() -> None:
    with pytest.raises(ValueError, match="no such form of a number: 'furlongs'"):
        Draft("any", 100).say("{n:furlongs}", n=1.0)
