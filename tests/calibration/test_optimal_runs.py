"""Whole runs with `--ablation optimal`: what they find, what they write, and that no interruption changes a bit."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from scipy.optimize import minimize
from torch import Tensor, nn

import headprobe
from headprobe.backbone.growing.growing_pass import GrowingPass
from headprobe.calibration import optimal
from headprobe.module import HeadProbe
from tests.callbacks.test_resume import broken_off
from tests.cli_runs import QUICK, Ended, command, only_message
from tests.describe.driving import small_probe
from tests.forked import digits, run

pytestmark = pytest.mark.usefixtures("no_pictures")

RUN = ("test", "--data.path", "set", "--data.num_workers", "0", "--trainer.accelerator", "cpu")
HEADS = (*RUN, "--ablation", "mean,optimal", "--mask-spec", "each:layer")
FEW_ROUNDS = 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    digits(tmp_path / "set", 40, 5)
    return tmp_path


@pytest.fixture
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimal, "MOST_ROUNDS", FEW_ROUNDS)


def constants(ended: Ended, version: int = 0) -> bytes:
    return (ended.directory(version) / "calibration.safetensors").read_bytes()


def search_of(ended: Ended, version: int = 0) -> dict[str, Any]:
    about: dict[str, Any] = json.loads((ended.directory(version) / "calibration.json").read_text())["optimal"]
    return about


# -- what is found -----------------------------------------------------------------------------------------------------


def found_by_both(probe: HeadProbe, folder: Path, layer: int, head: int) -> tuple[Any, dict[str, Any], Any]:
    """The constant that a run finds with what it says of it, and scipy's result from the same mean."""
    data = headprobe.ImageNetDataModule(str(folder / "set"), num_workers=0, calibration="same")
    probe.choose_masks(f"head:{layer}.{head}", "optimal")
    options: dict[str, Any] = {"accelerator": "cpu", "default_root_dir": folder, "enable_progress_bar": False}
    headprobe.ProbeTrainer(**options).test(probe, datamodule=data, verbose=False)
    assert probe.calibration is not None
    found, (report,) = probe.calibration.layers[layer], probe.calibration.about["optimal"]["heads"]

    data.calibrating = True
    batches = list(data.stream())
    images, labels = torch.cat([one.images for one in batches]), torch.cat([one.labels for one in batches])
    assert found.optimal is not None
    return found.optimal[head], report, best_by_scipy(probe, layer, head, images, labels, found.mean[head])


def best_by_scipy(probe: HeadProbe, layer: int, head: int, images: Tensor, labels: Tensor, start: np.ndarray) -> Any:
    """The best constant of a head by plain hooks and scipy in float64."""
    model = copy.deepcopy(probe.backbone).double().eval().requires_grad_(False)
    dim = probe.layout.layers[layer].head_dim
    now: dict[str, Tensor] = {}

    def replaced(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        slots = args[0].clone()
        slots[..., head * dim : (head + 1) * dim] = now["constant"]
        return (slots,)

    model.get_submodule(probe.layout.layers[layer].point).register_forward_pre_hook(replaced)
    inputs = probe.normalised(images).double()

    def loss(constant: np.ndarray) -> tuple[float, np.ndarray]:
        leaf = now["constant"] = torch.tensor(constant, dtype=torch.float64, requires_grad=True)
        found = nn.functional.cross_entropy(model(inputs), labels)
        found.backward()
        return float(found.detach()), leaf.grad.numpy()  # type: ignore[union-attr]

    options = {"maxiter": 1000, "ftol": 1e-15, "gtol": 1e-9}
    return minimize(loss, start, jac=True, method="L-BFGS-B", options=options)


@pytest.mark.parametrize("head", [0, 3, 7])
def test_the_constant_of_a_head_in_the_last_layer_is_the_one_that_scipy_finds(folder: Path, head: int) -> None:
    # Two channels a head and no last norm: behind one, random weights want endless constants.
    probe = small_probe("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, num_heads=12, depth=2)
    probe.backbone.norm = nn.Identity()
    found, report, best = found_by_both(probe, folder, 1, head)
    assert report["converged"]
    np.testing.assert_allclose(found, best.x, atol=1e-3 * np.abs(best.x).max())
    assert report["nll"] == pytest.approx(best.fun, rel=1e-5)


def test_no_constant_of_a_trained_last_layer_is_better_than_the_one_found(folder: Path) -> None:
    # along some of the 16 channels the loss is all but flat, so only the loss is one and the same
    _, report, best = found_by_both(HeadProbe("digits_vit"), folder, 5, 1)
    assert report["nll"] == pytest.approx(best.fun, abs=2e-5)
    assert report["nll"] < report["nll_of_mean"]


def test_on_judged_images_the_bundled_model_loses_less_with_optimal_constants_than_with_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimal, "MOST_ROUNDS", 10)
    heads = ["head:0.1", "head:0.2", "head:1.3", "head:2.1"]
    (tmp_path / "run.yaml").write_text(f"mask_spec: [{', '.join(heads)}]\nablation: [mean, optimal]\n")
    ended = command(tmp_path, "test", "--config", "run.yaml", *QUICK, "--data.max_images", "200")
    assert ended.code == 0, ended.err
    rises = dict.fromkeys(("mean", "optimal"), 0.0)
    for row in ended.rows()[1:]:
        rises[row["ablation"]] += float(row["nll_rise"])
    assert rises["optimal"] < rises["mean"]


# -- what is said ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("few_rounds")
def test_a_run_says_how_every_search_ended(folder: Path) -> None:
    ended = command(folder, *HEADS)
    assert ended.code == 0, ended.err
    about = search_of(ended)
    assert (about["rounds"], about["most_rounds"], len(about["heads"])) == (FEW_ROUNDS, FEW_ROUNDS, 24)
    assert json.loads((ended.directory() / "run.json").read_text())["optimal"] == about
    converged = sum(one["converged"] for one in about["heads"])
    assert f"optimal: {converged} of 24 heads converged within {FEW_ROUNDS} rounds" in ended.out
    for one in about["heads"]:
        assert one["nll"] <= one["nll_of_mean"]
    found = load_file(ended.directory() / "calibration.safetensors")
    assert all(np.isfinite(found[f"layers.{layer}.optimal"]).all() for layer in range(6))


@pytest.mark.usefixtures("few_rounds")
def test_heads_that_have_not_converged_are_a_warning(folder: Path) -> None:
    ended = command(folder, *RUN, "--ablation", "optimal", "--mask-spec", "head:0.1")
    assert "headprobe: the ablation optimal has not converged within 4 rounds for 1 head (0.1)" in ended.err


@pytest.mark.usefixtures("few_rounds")
def test_only_heads_that_are_masked_are_optimised_and_constants_of_others_are_refused(folder: Path) -> None:
    ended = command(folder, *RUN, "--ablation", "optimal", "--mask-spec", "head:4.0,2+head:5.1")
    assert ended.code == 0, ended.err
    assert [(one["layer"], one["head"]) for one in search_of(ended)["heads"]] == [(4, 0), (4, 2), (5, 1)]
    found = load_file(ended.directory() / "calibration.safetensors")
    assert np.isfinite(found["layers.4.optimal"]).all(1).tolist() == [True, False, True, False]
    assert np.isnan(found["layers.0.optimal"]).all()

    file = str(ended.directory())
    again = command(folder, *RUN, "--ablation", "optimal", "--mask-spec", "head:4.2", "--calibration-file", file)
    assert again.code == 0, again.err
    other = command(folder, *RUN, "--ablation", "optimal", "--mask-spec", "layer:4", "--calibration-file", file)
    assert other.code == 2
    assert (
        "none for 2 heads of 4: fit it anew without --calibration-file, got no constant for 4.1, 4.3"
        in only_message(other)
    )


def test_the_dry_run_states_the_rounds(folder: Path) -> None:
    ended = command(folder, *HEADS, "--dry-run")
    assert ended.code == 0, ended.err
    assert "optimal: at most 40 rounds of a forward and backward pass over the calibration images" in ended.out
    assert "for each of 24 heads until it has converged; a round costs as much as " in ended.out
    assert re.search(r"time in all: at most about [\d.]+ (s|min)", ended.out)
    assert not (folder / "lightning_logs").exists()


# -- to the bit --------------------------------------------------------------------------------------------------------


def calibrated_batches(folder: Path) -> tuple[Ended, int]:
    """Run `HEADS` and count the batches of the images that calibrate."""
    real = HeadProbe.validation_step
    seen: list[int] = []

    def step(self: HeadProbe, batch: Any, batch_idx: int) -> Any:
        seen.append(batch_idx)
        return real(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeadProbe, "validation_step", step)
        return command(folder, *HEADS), len(seen)


@pytest.mark.usefixtures("few_rounds")
def test_a_run_that_was_killed_in_any_round_goes_on_to_the_same_bits(folder: Path, tmp_path_factory: Any) -> None:
    undisturbed = tmp_path_factory.mktemp("undisturbed")
    digits(undisturbed / "set", 40, 5)
    expected, batches = calibrated_batches(undisturbed)
    assert batches == 5 * (1 + FEW_ROUNDS)

    broken_off(folder, 8, *HEADS, stage="validation_step")  # three units of the first round
    broken_off(folder, 6, *HEADS, stage="validation_step")  # the rest of it, and four of the second
    ended, batches = calibrated_batches(folder)
    assert batches == 5 * (1 + FEW_ROUNDS) - 14
    assert constants(ended) == constants(expected)  # the runs that broke off before any result left no folder
    assert (ended.directory() / "masks.csv").read_bytes() == (expected.directory() / "masks.csv").read_bytes()

    again, batches = calibrated_batches(folder)
    assert (again.code, batches) == (0, 0)
    assert constants(again, 1) == constants(expected)


@pytest.mark.usefixtures("few_rounds")
def test_memory_that_ends_changes_only_the_rows(folder: Path) -> None:
    expected = command(folder, *HEADS)
    real = GrowingPass.logits

    def scarce(self: GrowingPass, images: Tensor, plan: Any, taps: Any = ()) -> Tensor:
        if torch.is_grad_enabled() and plan.most_rows > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, images, plan, taps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GrowingPass, "logits", scarce)
        ended = command(folder, *HEADS, "--resume", "never")
    assert ended.code == 0, ended.err
    assert "going on with 4" in ended.err
    for one, other in zip(search_of(expected)["heads"], search_of(ended, 1)["heads"], strict=True):
        assert one["nll"] == pytest.approx(other["nll"], rel=1e-4)


@pytest.mark.slow
def test_two_processes_find_what_one_finds_to_the_bit(folder: Path, tmp_path_factory: Any) -> None:
    words = (*RUN, "--ablation", "mean,optimal", "--mask-spec", "head:4.0-1")
    alone = run(folder, *words)
    assert alone.code == 0, alone.err
    other = tmp_path_factory.mktemp("two")
    digits(other / "set", 40, 5)
    two = run(other, *words, processes=2)
    assert two.code == 0, two.err
    assert constants(two) == constants(alone)
    assert (two.directory() / "masks.csv").read_bytes() == (alone.directory() / "masks.csv").read_bytes()
