"""What a dry run says of a classifier that is fitted: images, memory and time, and nothing that noise made."""

import re
from pathlib import Path

import pytest

from headprobe.commands.dry import classifier as dry_classifier
from headprobe.commands.dry import timing as dry_timing
from headprobe.commands.dry.classifier import ClassifierCost
from tests.cli_runs import command, only_message

WORDS = ("test", "--mask-spec", "layer:0", "--data.num_workers", "0", "--trainer.accelerator", "cpu", "--dry-run")


@pytest.fixture(autouse=True)
def _briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_timing, "TIMED_SECONDS", 0.0)


@pytest.mark.parametrize(
    ("classifier", "what", "size"),
    [
        ("class-mean", "means of 10 classes", 10 * 64 * 8 / 2**10),
        ("knn", "a bank of 251 images", 251 * 64 * 4 / 2**10),
    ],
)
def test_images_memory_and_time_are_stated(tmp_path: Path, classifier: str, what: str, size: float) -> None:
    ended = command(tmp_path, *WORDS, "--model.classifier", classifier)
    assert (ended.code, ended.err) == (0, "")
    lines = dict(line.split(": ", 1) for line in ended.out.splitlines())
    assert "on 251 images, in one forward pass" in lines["fitting the classifier"]
    assert lines["classifier"].startswith(f"{what}, {size:.0f} KiB in every process")
    assert re.match(r"about .* for 251 images \([\d.e+-]+ ms an image", lines["time to fit the classifier"])
    assert "for 249 images on one process" in lines["time to judge"]
    assert "time in all" in lines
    assert "a class-mean classifier is not" not in ended.out  # a decision about noise
    assert list(tmp_path.iterdir()) == []


def test_constants_and_scores_are_planned_beside_it(tmp_path: Path) -> None:
    ended = command(tmp_path, *WORDS, "--model.classifier", "class-mean", "--ablation", "mean,optimal", "--score-heads")
    assert (ended.code, ended.err) == (0, "")
    for start in (
        "fitting the classifier: class-mean:0.07 on 251",
        "fitting: mean, scores of heads on 251",
        "optimal: ",
    ):
        assert f"\n{start}" in ended.out


def test_a_bank_that_is_too_large_is_refused_with_the_size_that_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headprobe.metrics.feature_bank.MOST_BYTES", 100 * 64 * 4)
    ended = command(tmp_path, *WORDS, "--model.classifier", "knn")
    assert ended.code == 2
    assert "give --data.calibration_images 100 or fewer" in only_message(ended)


@pytest.mark.parametrize(
    ("means", "peak", "measured"),
    [(True, "322.3 MiB", 302), (False, "1.4 GiB", 1268)],  # MiB, as in dry/classifier.py
)
def test_imagenets_classes_and_100000_images_fit_into_the_memory_that_is_stated(
    means: bool, peak: str, measured: int
) -> None:
    cost = ClassifierCost("class-mean" if means else "knn", 100_000, 1000, 768, means, 0.04)
    assert f"up to about {peak} at the peak" in cost.lines()[1]
    assert cost.size is not None
    times = dry_classifier.MEANS_AT_THE_PEAK if means else dry_classifier.BANKS_AT_THE_PEAK
    assert cost.size * times / 2**20 == pytest.approx(measured, rel=0.2)


def test_an_unknown_number_of_images_is_said() -> None:
    lines = [*ClassifierCost("knn", None, 10, 64, False, 0.04).lines()]
    assert "an unknown number of images" in lines[0]
    assert "a bank of 256 bytes an image" in lines[1]
