import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from statsmodels.stats.multitest import multipletests

from headprobe.callbacks.identity import run_key, versions
from headprobe.errors import RunError, UsageError
from headprobe.files import write_text
from headprobe.masks.spec import MaskSpec, Variant, expand_all
from headprobe.metrics.accuracy.paired_accuracy import PairedAccuracy
from headprobe.metrics.accuracy.scores import PairedScores, paired_scores
from headprobe.run.load import load_files
from headprobe.run.results import class_rows, variant_rows, write_masks, write_record, write_rows

HEADS = (2, 2, 2)


def example(specs: list[str], images: int = 40) -> tuple[list[Variant], PairedScores]:
    masks = expand_all([MaskSpec(spec) for spec in specs], HEADS, "tiny")
    generator = torch.Generator().manual_seed(0)
    metric = PairedAccuracy(len(masks), 6, per_class=True)
    labels = torch.randint(0, 6, (images,), generator=generator)
    metric.update(torch.randn(1 + len(masks), images, 6, generator=generator), labels, torch.arange(images) % 64)
    return masks, paired_scores(metric.to_arrays())


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    masks, scores = example(["each:layer", "head:1.0"])
    rows = variant_rows(masks, scores)
    write_rows(tmp_path / "masks.csv", rows)
    write_masks(tmp_path / "masks.json", masks)
    write_record(tmp_path, {"status": "done"})
    run = load_files(tmp_path)
    assert run.record == {"schema": 1, "status": "done"}
    assert run.heads["head:1.0"] == [(1, 0)]
    for found, written in zip(run.masks, rows, strict=True):
        for name, cell in written.items():
            assert found[name] == cell or (math.isnan(float(cell)) and math.isnan(float(found[name]))), name


def test_the_columns_are_those_that_the_design_names(tmp_path: Path) -> None:
    masks, scores = example(["layer:1"])
    write_rows(tmp_path / "masks.csv", variant_rows(masks, scores))
    with (tmp_path / "masks.csv").open() as file:
        columns = set(next(csv.reader(file)))
    named = (
        "mask ablation draw test_family heads_masked images top1_count top5_count top1 top5 nll drop_pp drop_low_pp "
        "drop_high_pp "
        "right_to_wrong wrong_to_right mcnemar_p bh_q agreement kl_nats"
    )
    assert columns >= set(named.split())


def published_q(p_values: list[float]) -> list[float]:
    return [float(q) for q in multipletests(p_values, method="fdr_bh")[1]]


def test_q_values_are_taken_over_one_sweep_and_not_over_masks_given_by_themselves() -> None:
    masks, scores = example(["each:layer", "all"])
    rows = variant_rows(masks, scores)
    q_values = [float(row["bh_q"]) for row in rows]
    assert [math.isnan(q) for q in q_values] == [True, False, False, False, True]
    assert q_values[1:4] == pytest.approx(published_q([float(row["mcnemar_p"]) for row in rows[1:4]]))


SHARED = ["grow:random:0", "random:1-4:0", "random:2,4:0,1", "random:3:0"]
"""Three test families that share masks, and one of these masks given by itself."""


def test_q_is_the_largest_over_all_test_families_of_a_mask() -> None:
    masks, scores = example(SHARED)
    rows = {str(row["mask"]): row for row in variant_rows(masks, scores)[1:]}
    p_values = {name: float(row["mcnemar_p"]) for name, row in rows.items()}
    largest = dict.fromkeys(rows, 0.0)
    families: dict[str, set[str]] = {name: set() for name in rows}
    for spec in SHARED[:3]:
        names = [one.name for one in MaskSpec(spec).expand(HEADS, "tiny")]
        for name, q in zip(names, published_q([p_values[name] for name in names]), strict=True):
            largest[name] = max(largest[name], q)
            families[name].add(spec)
    assert {name: float(row["bh_q"]) for name, row in rows.items()} == pytest.approx(largest)
    assert {name: set(str(row["test_family"]).split(" :: ")) for name, row in rows.items()} == families


@pytest.mark.parametrize("specs", [SHARED, SHARED[::-1], [SHARED[2], SHARED[3], SHARED[0], SHARED[1]]])
def test_the_order_of_the_specs_changes_no_cell(specs: list[str]) -> None:
    def cells(texts: list[str]) -> dict[str, tuple[object, object]]:
        masks = expand_all([MaskSpec(text) for text in texts], HEADS, "tiny")
        # Counts that follow from the mask, in whatever place it stands.
        lost = np.array([0, *(3 + 2 * len(one.mask.name) % 5 + one.mask.mask.count for one in masks)])
        zero = np.zeros(len(lost))
        counts: dict[str, NDArray[np.generic]] = dict.fromkeys(("top1", "top5", "agreement", "nonfinite"), lost * 0)
        counts |= {"images": np.array(40), "right_to_wrong": lost, "wrong_to_right": lost * 0 + 1}
        counts |= {
            "group_images": np.zeros(64, dtype=np.int64),
            "group_top1": np.zeros((len(lost), 64), dtype=np.int64),
        }
        powers = [f"nll_difference_{power}" for power in ("square", "cube", "fourth")]
        sums = {"group_nll": np.zeros((len(lost), 64))} | dict.fromkeys(["nll", "kl", *powers], zero)
        rows = variant_rows(masks, paired_scores(counts | sums))
        return {str(row["mask"]): (row["test_family"], str(row["bh_q"])) for row in rows}

    assert cells(specs) == cells(SHARED)


def test_a_mask_shared_by_two_sweeps_is_tested_in_the_one_that_is_no_null() -> None:
    masks, scores = example(["one-per-layer:5+each:layer", "layer:1+one-per-layer:5-7"])
    rows = {str(row["mask"]): row for row in variant_rows(masks, scores)}
    assert rows["layer:1+one-per-layer:5"]["test_family"] == "each:layer+one-per-layer:5"
    assert rows["layer:1+one-per-layer:6"]["test_family"] == ""


def test_a_mask_without_heads_is_no_member_of_its_test_family() -> None:
    masks, scores = example(["random:0-2/2:0-1"])
    rows = variant_rows(masks, scores)
    assert all((row["test_family"] != "") == (row["heads_masked"] == 2) for row in rows)


def test_repeats_of_the_same_heads_are_one_test_and_share_its_q() -> None:
    masks, scores = example(["random:2-6/4:0-3"])
    rows = variant_rows(masks, scores)[1:]
    everything = [float(row["bh_q"]) for row in rows if row["heads_masked"] == 6]
    assert len(everything) == 4
    assert len(set(everything)) == 1
    tests = {one.mask.mask.digest: float(row["mcnemar_p"]) for one, row in zip(masks, rows, strict=True)}
    largest = max(tests.values())  # Benjamini & Hochberg 1995: the largest p is its own q
    assert max(float(row["bh_q"]) for row in rows) == pytest.approx(largest)


@pytest.mark.parametrize(("spec", "tested"), [("one-per-layer:0-3", False), ("one-per-layer:5+each:layer", True)])
def test_null_draws_have_no_q_and_sweeps_beside_one_do(spec: str, tested: bool) -> None:
    masks, scores = example([spec])
    assert [not math.isnan(float(row["bh_q"])) for row in variant_rows(masks, scores)[1:]] == [tested] * len(masks)


def test_class_drops_add_up_to_the_whole_drop() -> None:
    masks, scores = example(["layer:0", "layer:1"])
    rows = class_rows(masks, scores, list(enumerate("abcdef")))
    for number, one in enumerate(masks, start=1):
        own = [row for row in rows if row["mask"] == one.mask.name]
        lost = sum(float(row["drop_pp"]) * float(row["images"]) / 100 for row in own)
        assert round(lost) == scores.top1_count[0] - scores.top1_count[number]
        assert sum(int(row["images"]) for row in own) == 40


def test_a_directory_without_results_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is not the directory of a finished run: run\.json is missing"):
        load_files(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "masks.csv", "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunError, match="No space left on device"):
        write_text(tmp_path / "masks.csv", "new")
    assert (tmp_path / "masks.csv").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["masks.csv"]


def test_the_key_depends_on_every_value_and_on_no_order() -> None:
    assert run_key({"a": 1, "b": [1, 2]}) == run_key({"b": [1, 2], "a": 1})
    assert run_key({"a": 1, "b": [1, 2]}) != run_key({"a": 1, "b": [2, 1]})


def test_versions_name_every_package_that_can_change_a_number() -> None:
    assert {"torch", "timm", "pillow", "torchvision"} <= versions().keys()
