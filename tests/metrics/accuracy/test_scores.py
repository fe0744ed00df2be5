"""Scores derived from hand-made sums."""

import subprocess
import sys

import numpy as np
import pytest
from numpy.typing import NDArray

from headprobe.metrics.accuracy.scores import PairedScores, paired_scores

DIFFERENCES = (
    "drop_low_pp",
    "drop_high_pp",
    "mcnemar_p",
    "log_e_value",
    "nll_rise_low",
    "nll_rise_high",
)


@pytest.fixture
def sums() -> dict[str, NDArray[np.generic]]:
    """Baseline 70 of 100 right; mask 1 loses 9 and wins 3; mask 2 changes nothing."""
    counts = {
        "classes": 10,
        "images": 100,
        "top1": [70, 64, 70],
        "top5": [90, 85, 90],
        "right_to_wrong": [0, 9, 0],
        "wrong_to_right": [0, 3, 0],
        "agreement": [100, 80, 100],
        "nonfinite": [0, 0, 0],
        "group_images": [100],  # as if there were one group
        "group_top1": [[70], [64], [70]],
    }
    reals = {
        "nll": [110.0, 131.0, 110.0],
        "nll_difference_square": [0.0, 40.0, 0.0],
        "nll_difference_cube": [0.0, 90.0, 0.0],
        "nll_difference_fourth": [0.0, 300.0, 0.0],
        "kl": [0.0, 7.0, 0.0],
        "group_nll": [[110.0], [131.0], [110.0]],
    }
    arrays: dict[str, NDArray[np.generic]] = {name: np.asarray(value, dtype=np.int64) for name, value in counts.items()}
    return arrays | {name: np.asarray(value, dtype=np.float64) for name, value in reals.items()}


def empty(sums: dict[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
    return {name: value if name == "classes" else np.zeros_like(value) for name, value in sums.items()}


def test_fractions_and_means_are_per_image(sums: dict[str, NDArray[np.generic]]) -> None:
    scores = paired_scores(sums)
    got = [scores.top1[1], scores.top5[1], scores.agreement[1], scores.nll[1], scores.kl_nats[1], scores.nll_rise[1]]
    assert got == pytest.approx([0.64, 0.85, 0.8, 1.31, 0.07, 0.21])


def test_drop_is_the_difference_of_the_accuracies(sums: dict[str, NDArray[np.generic]]) -> None:
    scores = paired_scores(sums)
    np.testing.assert_allclose(scores.drop_pp, 100 * (scores.top1[0] - scores.top1), atol=1e-12)


def test_baseline_differs_from_itself_by_nothing(sums: dict[str, NDArray[np.generic]]) -> None:
    scores = paired_scores(sums)
    assert [scores.drop_pp[0], scores.nll_rise[0], scores.kl_nats[0], scores.agreement[0]] == [0, 0, 0, 1]


@pytest.mark.parametrize("name", DIFFERENCES)
def test_only_masks_are_tested_against_the_baseline(sums: dict[str, NDArray[np.generic]], name: str) -> None:
    assert np.isnan(getattr(paired_scores(sums), name)).tolist() == [True, False, False]


def test_a_mask_that_changes_nothing_has_p_1_and_an_interval_around_0(sums: dict[str, NDArray[np.generic]]) -> None:
    scores = paired_scores(sums)
    assert scores.mcnemar_p[2] == 1
    assert scores.drop_low_pp[2] < 0 < scores.drop_high_pp[2]


def test_without_images_every_number_is_undefined_and_every_count_0(sums: dict[str, NDArray[np.generic]]) -> None:
    scores = paired_scores(empty(sums))
    for name, values in scores._asdict().items():
        if values is not None:
            undefined = values.dtype.kind == "f" and not name.startswith("group_")  # the groups' are sums, no means
            assert np.isnan(values).all() if undefined else not values.any(), name


def test_a_class_without_images_has_no_accuracy(sums: dict[str, NDArray[np.generic]]) -> None:
    per_class = {"class_images": np.array([100, 0]), "class_top1": np.array([[70, 0], [64, 0], [70, 0]])}
    accuracy = paired_scores(sums | per_class).class_top1
    np.testing.assert_array_equal(accuracy, [[0.70, np.nan], [0.64, np.nan], [0.70, np.nan]])


def test_every_row_score_has_one_entry_per_row(sums: dict[str, NDArray[np.generic]]) -> None:
    scores: PairedScores = paired_scores(sums)
    of_groups = {"group_images": (1,), "group_top1_count": (3, 1), "group_nll": (3, 1)}
    shapes = {name: values.shape for name, values in scores._asdict().items() if values is not None}
    assert shapes == dict.fromkeys(shapes, (3,)) | of_groups


def test_scores_are_read_without_torch() -> None:
    code = "import sys, headprobe.metrics.accuracy.scores; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
