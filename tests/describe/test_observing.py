from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from headprobe.backbone.capture.layer_record import LayerRecord
from headprobe.backbone.capture.taps import Tap, tapping
from headprobe.backbone.growing.growing_pass import GrowingPass
from headprobe.backbone.masking.ablation import ablating, masks_of_rows
from headprobe.describe.attention import AttentionSums
from headprobe.describe.base import HeadStatistic, Observation
from headprobe.errors import RunError
from headprobe.masks.spec import MaskSpec
from headprobe.module import HeadProbe
from headprobe.units.tree import NamedSums
from tests.describe.driving import describe, feed, noise, prepare, tiny_probe

KINDS = ["vit", "siglip", "swin", "swin_v2"]


class Keep(HeadStatistic):
    """Keeps copies of what it observes."""

    def __init__(self) -> None:
        self.observations: list[Observation] = []
        self.heads: list[tuple[Tensor, ...]] = []

    def options(self) -> dict[str, Any]:
        return {"name": "keep"}

    def observe(self, observation: Observation, sums: NamedSums) -> None:
        self.observations.append(observation)
        self.heads.append(tuple(record.heads_out.clone() for record in observation.records))

    def empty_sums(self) -> NamedSums:
        return {}


def plain_heads(probe: HeadProbe, images: Tensor, keep: Tensor) -> list[Tensor]:
    """The head outputs of one plain forward pass of all images, by layer."""
    found: list[Tensor] = []

    def take(record: LayerRecord) -> None:
        found.append(record.heads_out.clone())

    of_rows = masks_of_rows(keep.expand(1, *keep.shape))
    backbone, layout = probe.backbone, probe.layout
    with torch.inference_mode(), ablating(backbone, layout, of_rows), tapping(backbone, layout, [Tap(take)]):
        backbone(probe.normalised(images))
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", ["layer:1", "head:0.1", "layer:1+head:0.0"])
def test_baseline_and_masked_model_are_what_plain_forward_passes_see(kind: str, spec: str) -> None:
    probe, keep = tiny_probe(kind), Keep()
    images = noise(probe, 3)
    describe(probe, [keep], images, [spec], batch=3)
    shape = (len(probe.layout.layers), max(probe.layout.heads_per_layer))
    expected = [plain_heads(probe, images, torch.ones(shape, dtype=torch.bool))]
    expected.append(plain_heads(probe, images, probe.head_mask[0]))
    for layer, found in enumerate(keep.heads):
        for model, heads in enumerate(found):
            torch.testing.assert_close(heads, expected[model][layer], atol=1e-5, rtol=1e-5)


def test_before_the_first_masked_layer_the_masked_model_is_the_baseline_itself() -> None:
    probe, keep = tiny_probe("vit"), Keep()
    describe(probe, [keep], noise(probe, 2), ["layer:2"], batch=2)
    assert [one.records[0] is one.records[1] for one in keep.observations[:2]] == [True, True]
    assert not any(one.records[0] is one.records[1] for one in keep.observations[2:])


@pytest.mark.parametrize("specs", [[], ["none"], ["each:layer"]])
def test_without_a_single_mask_only_the_baseline_is_described(specs: list[str]) -> None:
    probe, keep = tiny_probe("vit"), Keep()
    describe(probe, [keep], noise(probe, 2), specs, batch=2)
    assert {len(one.records) for one in keep.observations} == {1}


def test_each_image_is_observed_once_in_each_layer_however_many_masks_and_waves() -> None:
    probe, keep = tiny_probe("vit"), Keep()
    probe.row_budget = 4  # several waves of masks, and one image per forward pass
    describe(probe, [keep], noise(probe, 5), ["each:head"], units=[3, 2], batch=2)
    assert probe.plan is not None
    assert len(probe.plan.waves) > 1
    rows = [(one.unit, one.layer, row) for one in keep.observations for row in one.rows.tolist()]
    layers = range(len(probe.layout.layers))
    assert sorted(rows) == sorted(
        (unit, n, row) for unit, size in ((0, 3), (1, 2)) for n in layers for row in range(size)
    )


def test_without_statistics_no_tap_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []

    def watched(*args: Any) -> Any:
        opened.append(len(args[2]))
        return tapping(*args)

    monkeypatch.setattr("headprobe.backbone.growing.growing_pass.tapping", watched)
    probe = tiny_probe("vit")
    describe(probe, [], noise(probe, 2), ["layer:1"], batch=2)
    assert opened == []
    describe(probe, [AttentionSums()], noise(probe, 2), ["layer:1"], batch=2)
    assert set(opened) == {2}  # the baseline's and the masked model's


def test_describing_changes_no_bit_of_the_logits_but_takes_no_shortcut() -> None:
    probe = tiny_probe("vit")
    images = noise(probe, 4)
    prepare(probe, [AttentionSums()], ["layer:1"], units=1, batch=4)
    with torch.inference_mode():
        short = probe.masked_logits(images)
        assert probe.passes is not None
        growing = probe.passes.growing
        with GrowingPass(probe.backbone, probe.layout, growing.joins, growing.keep) as whole:
            plain = whole.logits(probe.normalised(images), probe.passes.plan)
        observing = probe.passes.observing
        assert observing is not None
        sums = {statistic.name: statistic.open(0) for statistic in probe.statistics}
        outputs = probe.masked_outputs(images, lambda part: observing.taps(sums, 0, torch.arange(4)[part]))
        tapped = probe.outputs.split(outputs)[0]
    assert observing.began
    assert torch.equal(plain, tapped)
    torch.testing.assert_close(short, tapped, atol=1e-5, rtol=1e-5)


def fails_at(probe: HeadProbe, layer: int) -> Iterator[torch.utils.hooks.RemovableHandle]:
    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    module = probe.backbone.get_submodule(probe.layout.layers[layer].name)
    handle = module.register_forward_pre_hook(out_of_memory)
    yield handle
    handle.remove()


def test_memory_that_ends_while_heads_are_described_ends_the_run_with_the_remedy() -> None:
    probe = tiny_probe("vit")
    images = noise(probe, 8)
    prepare(probe, [AttentionSums()], ["layer:1"], batch=8)
    failing = fails_at(probe, 2)
    next(failing)
    with pytest.raises(RunError, match=r"--model\.row_budget 8"):
        feed(probe, images, [8], batch=8)


def test_memory_that_ends_before_any_layer_was_described_halves_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    probe, keep = tiny_probe("vit"), Keep()
    images = noise(probe, 8)
    prepare(probe, [keep], ["layer:1"], batch=8)
    embed: Any = probe.backbone.patch_embed
    plain = embed.forward

    def forward(x: Tensor) -> Tensor:
        if len(x) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(x)

    monkeypatch.setattr(embed, "forward", forward)
    with pytest.warns(UserWarning, match="out of memory"):
        feed(probe, images, [8], batch=8)
    layers = len(probe.layout.layers)
    assert sorted(row for one in keep.observations for row in one.rows.tolist()) == sorted([*range(8)] * layers)


def test_a_rehearsal_finds_the_rows_that_fit_and_leaves_no_trace() -> None:
    probe, statistic = tiny_probe("vit"), AttentionSums()
    prepare(probe, [statistic], ["layer:1"], batch=8)
    fits = 4

    def only_a_few(_: object, args: tuple[Tensor, ...]) -> None:
        if len(args[0]) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert probe.passes is not None
    hook = probe.backbone.get_submodule(probe.layout.layers[2].name).register_forward_pre_hook(only_a_few)
    with torch.inference_mode(), pytest.warns(UserWarning, match="out of memory"):
        probe.passes.rehearse(torch.device("cpu"))
    hook.remove()
    assert probe.passes.plan.most_rows <= fits
    feed(probe, noise(probe, 8), [8], batch=8)
    assert statistic.tables()["baseline"].images.tolist() == [8] * sum(probe.layout.heads_per_layer)


def test_a_statistic_needs_room_and_a_plan_first() -> None:
    probe = tiny_probe("vit")
    probe.choose_masks([MaskSpec("none")])
    probe.statistics = (AttentionSums(),)
    with pytest.raises(RunError, match="plan_passes"):
        probe.observe_heads()
