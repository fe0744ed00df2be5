"""Every number of every sentence is recomputed from the CSV files by `answer_oracle`, for runs of all kinds."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headprobe.report.page.answer import Sentence, answer
from headprobe.run.load import load_files, read_files
from headprobe.run.results import write_arrays, write_rows
from tests.report.page.answer_oracle import expected, power
from tests.run.small_runs import HEADS, write_heads, write_run

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
    bare = shown.rstrip("%").replace(",", "")
    decimals = len(bare.partition("e")[0].partition(".")[2]) - int(bare.partition("e")[2] or 0)
    return abs(float(bare) - value * (100 if shown.endswith("%") else 1)) <= 0.5000001 * 10.0**-decimals


CONSTANT = {"95%", "80%", "0.05", "0.001", "0", "1"}
"""Numbers of the text itself: confidence, power, levels, `holds 0`, `1 point`."""

NAMES = re.compile(r"\S+:[\d.,:+/-]*\d|(?<=head )\d+\.\d+")
"""Masks and heads, which are named by numbers."""


def numerals(text: str) -> list[str]:
    return re.findall(r"(?<![\w.:-])[+-]?\d[\d,]*(?:\.\d+)?(?:e-\d+)?%?(?!\w)", NAMES.sub("", text))


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
