import warnings
from pathlib import Path
from typing import Any

import lightning
import pytest
import timm
import torch
from torch import Tensor

from headprobe.backbone.growing.growing_pass import GrowingPass
from headprobe.backbone.heads.layout import Semantics
from headprobe.backbone.proofs.one_layer import prove_masks
from headprobe.backbone.weights import save_backbone
from headprobe.data.datamodule import ImageNetDataModule
from headprobe.errors import RunError, UsageError
from headprobe.masks.spec import MaskSpec
from headprobe.metrics.accuracy.paired_accuracy import restrict_classes
from headprobe.metrics.accuracy.scores import PairedScores
from headprobe.module import HeadProbe
from tests.conftest import perturbed


def score(probe: HeadProbe, tmp_path: Path, spec: str = "each:layer", **options: Any) -> PairedScores:
    """Score 60 digits."""
    data = ImageNetDataModule(max_images=60, num_workers=0, **options)
    probe.choose_masks([MaskSpec(spec)])
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.test(probe, data, verbose=False)
    assert probe.scores is not None
    return probe.scores


def test_a_trainer_without_our_command_line_gives_the_scores(tmp_path: Path) -> None:
    scores = score(HeadProbe(), tmp_path)
    assert scores.images.tolist() == [60] * 7
    assert scores.top1[0] > 0.95
    assert (scores.top1_count[0] - scores.top1_count == scores.right_to_wrong - scores.wrong_to_right).all()


def test_the_row_budget_changes_no_integer(tmp_path: Path) -> None:
    wide, narrow = (score(HeadProbe(row_budget=rows), tmp_path, "each:head") for rows in (500, 7))
    for name in ("top1_count", "top5_count", "right_to_wrong", "wrong_to_right"):
        assert getattr(wide, name).tolist() == getattr(narrow, name).tolist(), name


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: out of memory"),  # of the driver, as where a kernel is loaded
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_out_of_memory_halves_the_rows_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    expected = score(HeadProbe(row_budget=40), tmp_path)
    forward = GrowingPass._forward

    def small_memory(self: GrowingPass, images: Tensor, wave: tuple[int, ...], whole: bool) -> Tensor:
        if len(images) * (1 + len(wave)) > 12:
            raise error
        return forward(self, images, wave, whole)

    probe = HeadProbe(row_budget=40)
    monkeypatch.setattr("headprobe.passes.find_joins", _joins_of(probe))
    monkeypatch.setattr(GrowingPass, "_forward", small_memory)
    found = score(probe, tmp_path)
    assert probe.plan is not None
    assert probe.plan.most_rows <= 12
    assert found.top1_count.tolist() == expected.top1_count.tolist()


def _joins_of(probe: HeadProbe) -> Any:
    from headprobe.backbone.growing.joins import FoundJoins, find_joins

    found = find_joins(probe.backbone, probe.layout)
    return lambda backbone, layout, layers, outputs: FoundJoins(found.joins, ())


def test_when_not_even_one_row_fits_the_run_ends_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(self: GrowingPass, images: Tensor, wave: tuple[int, ...], whole: bool) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    probe = HeadProbe()
    monkeypatch.setattr("headprobe.passes.find_joins", _joins_of(probe))
    monkeypatch.setattr(GrowingPass, "_forward", no_memory)
    with pytest.raises(RunError, match="not even one image fits into memory"):
        score(probe, tmp_path)


def test_an_error_that_is_not_out_of_memory_is_not_swallowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: GrowingPass, images: Tensor, wave: tuple[int, ...], whole: bool) -> Tensor:
        raise RuntimeError("a kernel failed")

    probe = HeadProbe()
    monkeypatch.setattr("headprobe.passes.find_joins", _joins_of(probe))
    monkeypatch.setattr(GrowingPass, "_forward", broken)
    with pytest.raises(RuntimeError, match="a kernel failed"):
        score(probe, tmp_path)


def test_the_head_mask_is_no_part_of_the_weights() -> None:
    probe = HeadProbe()
    probe.choose_masks([MaskSpec("each:head")])
    assert probe.head_mask.shape == (24, 6, 4)
    assert not [name for name in probe.state_dict() if not name.startswith("backbone.")]


def test_after_a_run_the_backbone_is_bit_identical_to_before(tmp_path: Path) -> None:
    probe = HeadProbe(name="digits_swin")
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = probe.backbone.eval()(images)
        score(probe, tmp_path, "all")
        assert torch.equal(probe.backbone(images), before)
    assert not any(module._forward_pre_hooks for module in probe.backbone.modules())


def test_normalisation_equals_timms_own_transform_bit_for_bit() -> None:
    from PIL import Image

    probe = HeadProbe()
    transform = timm.data.create_transform(**probe.data_config, is_training=False)
    pixels = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    assert torch.equal(probe.normalised(pixels[None])[0], transform(image))


def test_restricted_classes_are_renumbered_and_strangers_refused() -> None:
    logits = torch.arange(12.0).reshape(1, 2, 6)
    valid = torch.tensor([1, 4, 5])
    found, labels = restrict_classes(logits, torch.tensor([5, 1]), valid)
    assert found.tolist() == [[[1, 4, 5], [7, 10, 11]]]
    assert labels.tolist() == [2, 0]
    with pytest.raises(RunError, match="label 3 is none of the 3 classes"):
        restrict_classes(logits, torch.tensor([3, 1]), valid)
    with pytest.raises(RunError, match="label 6"):
        restrict_classes(logits, torch.tensor([6, 1]), valid)


@pytest.mark.parametrize("rows", [0, -1])
def test_a_row_budget_below_one_is_refused(rows: int) -> None:
    with pytest.raises(UsageError, match=f"row_budget must be 1 or more, got {rows}"):
        HeadProbe(row_budget=rows)


def test_bf16_weights_run_and_keep_exact_counts(tmp_path: Path) -> None:
    probe = HeadProbe().to(torch.bfloat16)
    scores = score(probe, tmp_path, "layer:0")
    assert scores.images.tolist() == [60, 60]
    assert scores.top1[0] > 0.9


def test_new_masks_make_the_old_plan_void() -> None:
    probe = HeadProbe()
    probe.choose_masks([MaskSpec("each:layer")])
    probe.plan_passes(4)
    probe.choose_masks([MaskSpec("layer:5")])
    with pytest.raises(RunError, match="plan_passes must be called"):
        probe.masked_logits(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_a_batch_without_a_good_image_counts_nothing() -> None:
    probe = HeadProbe()
    probe.choose_masks([MaskSpec("each:layer")])
    probe.plan_passes(4)
    with torch.inference_mode():
        assert probe.masked_logits(torch.zeros(0, 3, 32, 32, dtype=torch.uint8)).shape == (7, 0, 10)


def test_half_precision_is_proven_in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    prove = prove_masks

    def noting(backbone: Any, layout: Any) -> None:
        seen.append(next(backbone.parameters()).dtype)
        prove(backbone, layout)

    monkeypatch.setattr("headprobe.passes.prove_masks", noting)
    probe = HeadProbe().to(torch.bfloat16)
    probe.choose_masks([MaskSpec("layer:0")])
    probe.plan_passes(4)
    assert seen == [torch.float32]
    assert next(probe.backbone.parameters()).dtype == torch.bfloat16


def test_channels_that_do_not_match_are_refused_with_the_remedy() -> None:
    with pytest.raises(UsageError, match=r"different numbers of channels.*'in_chans': 1, 'input_size': 3"):
        HeadProbe(pretrained=False, options={"in_chans": 1})


def test_a_grey_model_saved_with_its_recipe_is_loaded_without_naming_its_channels_again(tmp_path: Path) -> None:
    overlay = {"input_size": [1, 32, 32], "mean": [0.5], "std": [0.5]}
    grey = HeadProbe(pretrained=False, options={"in_chans": 1, "pretrained_cfg_overlay": overlay})
    save_backbone(grey.backbone, tmp_path / "grey.safetensors", grey.source)
    again = HeadProbe("vit_tiny_patch16_224", str(tmp_path / "grey.safetensors"))
    assert again.data_config["input_size"] == (1, 32, 32)
    assert again.layout.heads_per_layer == (4,) * 6


def test_the_batch_size_is_part_of_the_plan() -> None:
    probe = HeadProbe()
    probe.choose_masks([MaskSpec("each:head")])
    assert probe.plan_passes(4).to_json() != probe.plan_passes(32).to_json()


def test_the_work_of_a_sweep_counts_the_layers_that_are_run() -> None:
    probe = HeadProbe()
    probe.choose_masks([MaskSpec("each:layer")])
    probe.plan_passes(4)
    assert probe.work == pytest.approx(1 + (6 + 5 + 4 + 3 + 2 + 1) / 6)


def test_what_masking_takes_away_is_chosen_by_the_model_and_part_of_its_identity() -> None:
    options = {"img_size": 64}
    logits: dict[str, Tensor] = {}
    choices: tuple[Semantics, ...] = ("slot", "attention")
    for semantics in choices:
        torch.manual_seed(0)
        probe = HeadProbe("mvitv2_tiny", pretrained=False, num_classes=5, options=options, semantics=semantics)
        perturbed(probe.backbone)
        assert probe.identity()["semantics"] == semantics
        probe.choose_masks([MaskSpec("layer:2")])
        probe.plan_passes(2)
        noise = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            logits[semantics] = probe.masked_logits(noise)
    assert torch.equal(logits["slot"][0], logits["attention"][0])
    assert not torch.allclose(logits["slot"][1], logits["attention"][1], atol=1e-3)


@pytest.mark.parametrize("spec", [3, None])
def test_a_spec_that_is_no_text_is_one_message(spec: Any) -> None:
    with pytest.raises(UsageError, match="a mask spec is text, such as layer:3"):
        HeadProbe().choose_masks(spec)
