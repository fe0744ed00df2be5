"""The main job on published weights and real images, against numbers from timm alone."""

from pathlib import Path

import pytest

from tests.cli_runs import command

pytestmark = [pytest.mark.real, pytest.mark.slow]


def test_deit_tiny_scores_as_timm_does(tmp_path: Path, sample_images: Path, deit_tiny_weights: Path) -> None:
    ended = command(
        tmp_path, "test", "--model.name", "deit_tiny_patch16_224", "--model.weights", str(deit_tiny_weights),
        "--data.path", str(sample_images), "--mask-spec", "layer:0", "--data.num_workers", "0",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    baseline, masked = ended.rows()
    assert (baseline["images"], baseline["top1_count"], baseline["top5_count"]) == ("500", "396", "474")
    assert float(baseline["nll"]) == pytest.approx(0.9685, abs=5e-5)
    assert masked["top1_count"] == "379"
