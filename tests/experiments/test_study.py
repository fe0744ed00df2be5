"""What a study scores on which model, and what it leaves out; nothing is run."""

from math import comb
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from headprobe.errors import UsageError
from headprobe.experiments.study import MOST_MORE, ORDERS, PARTS, SIZES, Heads, Study, study_of
from headprobe.masks.ablations import Ablations
from headprobe.masks.spec import MaskSpec, Variant, expand_all
from headprobe.masks.tables import SCORES
from headprobe.module import HeadProbe
from headprobe.run.load import load_files
from tests.conftest import TINY
from tests.run.small_runs import HEADS, write_run

THREE = Ablations("zero,mean,linear")
ENDS = ("zero", "linear")

DIGITS, DEIT_TINY, VIT_BASE = (4,) * 6, (3,) * 12, (12,) * 12
SWIN_TINY = (3, 3, 6, 6, 12, 12, 12, 12, 12, 12, 24, 24)


def specs_of(
    counts: tuple[int, ...], *parts: str, main: str = "zero", lacking: dict[str, str] | None = None
) -> list[str]:
    return [spec for name in parts or PARTS for spec in PARTS[name](Heads(counts, main, lacking or {}, ENDS)).specs]


def variants_of(counts: tuple[int, ...], *parts: str) -> list[Variant]:
    scores = {name: {(layer, head): 0.0 for layer, own in enumerate(counts) for head in range(own)} for name in SCORES}
    return expand_all([MaskSpec(spec) for spec in specs_of(counts, *parts)], counts, "model", THREE, scores)


def under(variants: list[Variant], kind: str) -> int:
    return sum(variant.ablation == kind for variant in variants)


@pytest.mark.parametrize(
    ("counts", "masks"), [(DIGITS, 637), (DEIT_TINY, 678), (VIT_BASE, 863), (SWIN_TINY, 1178)], ids=str
)
def test_a_study_has_so_many_variants(counts: tuple[int, ...], masks: int) -> None:
    assert len(variants_of(counts)) == masks


@pytest.mark.parametrize("config", ["vit_base", "swin_tiny"])
def test_a_config_says_how_many_masks_its_study_has(config: str) -> None:
    file = Path(__file__).parents[2] / f"configs/study_imagenet_{config}.yaml"
    counts = {"vit_base": VIT_BASE, "swin_tiny": SWIN_TINY}[config]
    assert f"{len(variants_of(counts)):,} masks beside the baseline" in file.read_text(encoding="utf-8")


@pytest.mark.parametrize("counts", [DIGITS, DEIT_TINY, VIT_BASE, SWIN_TINY, (2, 2, 3), (1, 2)], ids=str)
def test_orders_have_ten_equal_steps_up_to_all_heads(counts: tuple[int, ...]) -> None:
    sizes = Heads(counts, "zero", {}).sizes
    every = sum(counts)
    assert len(sizes) == min(SIZES, every)
    assert sizes[-1] == every
    steps = {after - before for before, after in zip([0, *sizes], sizes, strict=False)}
    assert max(steps) - min(steps) <= 1
    assert len(variants_of(counts, "random")) == 2 * ORDERS * len(sizes)


@pytest.mark.parametrize("counts", [DIGITS, DEIT_TINY, (2, 2, 4, 4, 8, 8)], ids=str)
def test_whole_orders_cost_at_most_so_many_masks_beside_the_sizes(counts: tuple[int, ...]) -> None:
    both = variants_of(counts, "random", "shapley")
    assert 0 < under(both, "zero") - under(both, "linear") <= MOST_MORE
    assert under(both, "linear") == len(variants_of(counts, "random")) / 2
    assert under(both, "mean") == 0


@pytest.mark.parametrize("counts", [VIT_BASE, SWIN_TINY], ids=str)
def test_what_would_cost_too_much_is_left_out_with_the_spec_that_adds_it(counts: tuple[int, ...]) -> None:
    for name in ("pairs", "shapley"):
        part = PARTS[name](Heads(counts, "zero", {}))
        assert part.specs == ()
        spec = part.missing.partition("--mask-spec ")[2].rstrip(")")
        assert MaskSpec(spec).ablations == ("zero",)
    assert f"{sum(comb(own, 2) for own in counts):,} pairs" in PARTS["pairs"](Heads(counts, "zero", {})).missing


def test_every_index_of_a_ragged_model_has_draws_enough_for_a_p(tmp_path: Path) -> None:
    run = load_files(write_run(tmp_path, specs_of(HEADS, "indices", "nulls"), ["zero", "mean"]))
    table = run.table("index_null.csv")
    assert table is not None
    assert set(table["mask"]) == {"index:0", "index:1", "index:2"}
    assert set(table["ablation"]) == {"zero"}  # the draws were scored under zero alone
    assert set(table["draws"]) == {99}


def test_where_each_layer_has_one_head_there_is_nothing_to_draw_or_to_pair() -> None:
    for name in ("nulls", "pairs"):
        part = PARTS[name](Heads((1, 1), "zero", {}))
        assert part.specs == ()
        assert "a single head" in part.missing


def test_an_order_by_a_score_that_some_heads_lack_is_left_out_by_name() -> None:
    part = PARTS["scores"](Heads(DIGITS, "zero", {"gradient_abs": "it has none"}))
    assert [spec.split(":")[2] for spec in part.specs] == [
        "residual_variance_after_projection", "variance_after_projection",
    ]  # fmt: skip
    assert part.missing == "no gradient_abs (it has none)"


# -- on models ---------------------------------------------------------------------------------------------------------


def tiny_probe(kind: str, **options: Any) -> HeadProbe:
    name, own = TINY[kind]
    own = {key: list(value) if isinstance(value, tuple) else value for key, value in own.items()}
    return HeadProbe(name, pretrained=False, num_classes=10, options=yaml.safe_load(yaml.safe_dump(own)), **options)


def chosen(probe: HeadProbe, ablations: str = "zero,mean,linear", **options: Any) -> Study:
    study = study_of(probe, Ablations(ablations), **options)
    study.choose(probe)
    return study


def test_a_plain_vit_lacks_nothing() -> None:
    probe = tiny_probe("vit")
    study = chosen(probe)
    assert study.left_out == ""
    assert {variant.ablation for variant in probe.variants} == {"zero", "mean", "linear"}
    assert probe.score_heads
    assert not [one for one in probe.decisions() if one.about == "left out of the study"]
    assert probe.statistics == ()  # nothing of the trial is left


def test_a_model_that_allows_no_linear_ablation_is_studied_without_and_says_why() -> None:
    probe = tiny_probe("eva_inner_norm")
    study = chosen(probe)
    assert [one.kind for one in study.ablations] == ["zero", "mean"]
    (said,) = (one for one in probe.decisions() if one.about == "left out of the study")
    assert said.shown
    assert "linear: between the heads of" in said.text
    assert "no variance_after_projection (a norm stands between" in said.text
    assert {variant.ablation for variant in probe.variants} == {"zero", "mean"}


def test_where_the_model_allows_none_of_the_ablations_the_refusal_is_the_models_own() -> None:
    with pytest.raises(UsageError, match="stands a norm over all heads"):
        chosen(tiny_probe("eva_inner_norm"), "linear")


class CutOff(nn.Module):
    """A block whose output has no history."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        found: Tensor = self.block(*args, **kwargs).detach()
        return found


def test_a_model_without_gradients_is_studied_without_scores() -> None:
    probe = tiny_probe("vit")
    backbone: Any = probe.backbone
    backbone.blocks[-1] = CutOff(backbone.blocks[-1])
    study = chosen(probe)
    assert not study.score_heads
    assert "scores of heads: " in study.left_out
    assert "gives none" in study.left_out
    assert not any("calibration" in spec for spec in study.specs)
    assert not probe.score_heads


def test_parts_that_are_skipped_have_no_masks_and_are_no_lack() -> None:
    probe = tiny_probe("vit")
    study = chosen(probe, skip=["nulls", "scores", "shapley", "random", "pairs"], more=["layer:0+head:1.0"])
    assert study.specs == ["each:layer", "each:index", "each:head", "layer:0+head:1.0"]
    assert study.left_out == ""
    assert not probe.score_heads
    assert "--mask-spec (layer:0+head:1.0)" in study.lines()[0]


def test_a_study_of_which_all_parts_are_skipped_says_that_it_scores_the_whole_model() -> None:
    study = chosen(tiny_probe("vit"), skip=[*PARTS])
    assert study.specs == ["none"]
    assert study.lines() == ["study: no masks, as all parts are skipped: the whole model alone"]


def test_without_zero_the_first_ablation_takes_its_place() -> None:
    probe = tiny_probe("vit")
    chosen(probe, "mean,linear", skip=["scores"])
    assert {one.ablation for one in probe.variants if one.mask.name.startswith("one-per-layer")} == {"mean"}


def test_an_unknown_part_is_refused_with_the_choices() -> None:
    with pytest.raises(UsageError, match=r"--skip must be some of layers, .* got 'pair'"):
        study_of(tiny_probe("vit"), THREE, skip=["pair"])


def test_the_trial_of_scores_leaves_no_gradient_behind() -> None:
    probe = tiny_probe("vit")
    chosen(probe)
    assert all(parameter.grad is None for parameter in probe.backbone.parameters())
    assert torch.is_grad_enabled()


def test_without_labels_heads_are_scored_by_variance_alone_and_no_gradient_is_tried() -> None:
    probe = HeadProbe("digits_vit", classifier="none")
    backbone: Any = probe.backbone
    backbone.blocks[-1] = CutOff(backbone.blocks[-1])  # a gradient would be refused
    study = chosen(probe)
    orders = {spec.split(":")[-3] for spec in study.specs if "calibration" in spec}
    assert orders == {"residual_variance_after_projection", "variance_after_projection"}
    assert study.score_heads
    assert "no gradient_abs (nothing classifies images" in study.left_out
    assert "scores of heads: " not in study.left_out
