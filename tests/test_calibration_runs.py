"""Runs that fit on some images and judge on others: exactly once, in two processes, refused where they must be."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import headprobe
from headprobe.calibration.constants import read_calibration
from headprobe.data.parts import calibrates
from tests.cli_runs import Ended, command, only_message
from tests.forked import run

FEW = ("--data.max_images", "60", "--data.num_workers", "0", "--trainer.accelerator", "cpu")
SPEC = ("--mask-spec", "layer:3", "--ablation", "zero,mean,linear")


def record(ended: Ended, number: int = 0) -> dict[str, object]:
    found: dict[str, object] = json.loads((ended.directory(number) / "run.json").read_text())
    return found


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    ended = command(tmp_path_factory.mktemp("half"), "test", *SPEC, *FEW)
    assert ended.code == 0, ended.err
    return ended


def test_one_half_fits_and_the_other_is_judged(half: Ended) -> None:
    rows = half.rows(0)
    assert [row["ablation"] for row in rows] == ["none", "zero", "mean", "linear"]
    judged = int(rows[0]["images"])
    fitted = int(record(half)["calibration_images"])  # type: ignore[call-overload]
    assert judged + fitted == 60
    assert 15 < judged < 45
    assert "fitted on" in half.out


def test_no_row_both_fits_and_judges() -> None:
    data = headprobe.ImageNetDataModule(max_images=60, num_workers=0, calibration="half")
    probe = headprobe.HeadProbe()
    data.split_off(fits=True)
    seen = {}
    for stage in ("validate", "test"):
        data.calibrating = stage == "validate"
        data.bind(probe.data_config, probe.num_classes)
        seen[stage] = {(batch.unit, int(row)) for batch in data.stream() for row in batch.rows}
        assert all(calibrates(*row) == data.calibrating for row in seen[stage])
    assert not seen["test"] & seen["validate"]
    assert len(seen["test"] | seen["validate"]) == 60


def test_the_judged_key_holds_masks_ablations_and_the_calibration(half: Ended) -> None:
    found = record(half)
    assert found["ablation"] == "zero,mean,linear"
    assert len(found["variants"]) == 3  # type: ignore[arg-type]
    assert len(str(found["calibration"])) == 64
    stores = [json.loads(file.read_text()) for file in half.folder.glob("lightning_logs/units/*/store.json")]
    identities = [store["identity"] for store in stores]
    assert sorted(len(identity["variants"]) for identity in identities) == [0, 3]
    calibration = next(identity for identity in identities if not identity["variants"])
    assert calibration["statistics"][0]["name"] == "slots"


def test_other_masks_share_the_calibration_and_are_scored_anew(half: Ended) -> None:
    again = command(half.folder, "test", "--mask-spec", "layer:1", "--ablation", "zero,mean,linear", *FEW)
    assert again.code == 0, again.err
    assert record(again, 1)["calibration"] == record(half)["calibration"]
    assert [row["top1_count"] for row in again.rows(1)] != [row["top1_count"] for row in half.rows(0)]
    assert len(list(half.folder.glob("lightning_logs/units/*/store.json"))) == 3


@torch.inference_mode()
def test_the_saved_constants_give_the_judged_numbers_with_plain_hooks(half: Ended) -> None:
    """Recompute the NLL of `layer:3` under mean and of the baseline, by a hook that knows nothing of ours."""
    probe = headprobe.HeadProbe()
    data = headprobe.ImageNetDataModule(max_images=60, num_workers=0, calibration="half")
    data.split_off(fits=True)
    data.bind(probe.data_config, probe.num_classes)
    constants = read_calibration(half.directory(0)).layers[3]
    mean = torch.from_numpy(constants.mean.reshape(-1)).float()
    projection = probe.backbone.get_submodule("blocks.3.attn.proj")
    sums = np.zeros(2)
    images = 0
    for batch in data.stream():
        pixels = probe.normalised(batch.images)
        plain = probe.backbone(pixels)
        handle = projection.register_forward_pre_hook(lambda _, args: (mean.expand_as(args[0]),))
        masked = probe.backbone(pixels)
        handle.remove()
        for number, logits in enumerate((plain, masked)):
            sums[number] += float(torch.nn.functional.cross_entropy(logits, batch.labels, reduction="sum"))
        images += len(batch.labels)
    rows = {row["ablation"]: float(row["nll"]) for row in half.rows(0)}
    np.testing.assert_allclose(sums / images, [rows["none"], rows["mean"]], atol=1e-5)
    assert rows["linear"] == pytest.approx(rows["mean"], abs=1e-9)  # a whole layer keeps nothing to predict from


def test_constants_of_a_run_are_used_again_and_never_judge_their_own_images(half: Ended) -> None:
    words = ("--calibration-file", "lightning_logs/version_0", *SPEC, *FEW)
    again = command(half.folder, "test", *words)
    assert again.code == 0, again.err
    number = max(int(path.name.split("_")[1]) for path in half.folder.glob("lightning_logs/version_*"))
    assert [row["nll"] for row in again.rows(number)] == [row["nll"] for row in half.rows(0)]
    other = command(half.folder, "test", *words, "--model.name", "digits_swin")
    assert other.code == 2
    assert "fitted on another model" in only_message(other)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--data.calibration", "third"), "must be half, same or split:NAME"),
        (("--data.calibration_images", "500"), "at most"),
        (("--data.calibration", "split:test"), "names the split that is judged"),
        (("--data.max_images", "1"), "no image is left"),
        (("--ablation", "meen"), "did you mean mean"),
        (("--ablation", "mean,mean"), "may stand once"),
        (("--calibration-file", "nowhere"), "calibration"),
    ],
)
def test_what_cannot_be_fitted_is_one_message(tmp_path: Path, words: tuple[str, ...], reason: str) -> None:
    spec = SPEC[:2] if "--ablation" in words else SPEC
    ended = command(tmp_path, "test", *spec, *FEW, *words)
    assert ended.code == 2, ended.err
    assert reason in only_message(ended)


def test_the_same_images_are_said_to_flatter(tmp_path: Path) -> None:
    ended = command(tmp_path, "test", *SPEC, *FEW, "--data.calibration", "same")
    assert ended.code == 0, ended.err
    assert "which flatters" in ended.out
    assert ended.rows(0)[0]["images"] == "60"


@pytest.mark.slow
def test_two_processes_fit_and_judge_the_same_bits(tmp_path: Path, half: Ended) -> None:
    two = run(tmp_path, "test", *SPEC, *FEW, processes=2)
    assert two.code == 0, two.err
    assert (two.directory(0) / "masks.csv").read_bytes() == (half.directory(0) / "masks.csv").read_bytes()
    name = "calibration.safetensors"
    one, other = read_calibration(two.directory(0) / name), read_calibration(half.directory(0) / name)
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        np.testing.assert_array_equal(mine.mean, theirs.mean)
        np.testing.assert_array_equal(mine.covariance, theirs.covariance)
