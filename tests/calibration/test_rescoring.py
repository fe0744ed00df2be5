"""Orders whose scores are computed anew step by step, against plain hooks that mask heads and autograd by hand."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from headprobe.calibration.constants import Calibration
from headprobe.calibration.rescoring import Rescoring, distinct, rescoring_kind, rounds_of, step_ends
from headprobe.calibration.scores import ScoreStatistic
from headprobe.calibration.slots import SlotStatistic
from headprobe.data.stream import ImageBatch
from headprobe.errors import UsageError
from headprobe.masks.ablations import Ablations
from headprobe.masks.spec import MaskSpec
from headprobe.module import HeadProbe
from headprobe.probe.calibrating import Calibrating
from headprobe.probe.rounds import rescoring_rounds
from tests.calibration.test_scores import LABELS, scored, weights_of
from tests.describe.driving import noise, tiny_probe

Head = tuple[int, int]


def driven(probe: HeadProbe, images: Tensor, labels: Tensor, stage: Calibrating) -> None:
    """Run images in two units through Lightning's validation step, and add them up."""
    probe.stage = stage
    with torch.inference_mode():
        probe.begin_units(2)
        probe.plan_passes(3)
        probe.observe_heads()
        for unit, places in enumerate((range(4), range(4, len(images)))):
            for rows in torch.tensor(places).split(3):
                batch = ImageBatch(
                    images[rows].clone(), labels[rows].clone(), unit, rows - places[0], places[-1] in rows
                )
                probe.validation_step(batch, 0)
    assert probe.unit_sums is not None
    probe.unit_sums.whole()


def calibrated(probe: HeadProbe, images: Tensor, labels: Tensor = LABELS) -> Calibration:
    """The whole model's constants and scores."""
    slots, scores = SlotStatistic(["linear"]), ScoreStatistic(probe.backbone)
    driven(probe, images, labels, Calibrating(probe, (slots, scores)))
    constants = slots.constants()
    layers = [
        type(layer)(**{**vars(layer), "scores": own})
        for layer, own in zip(constants, scores.scores(constants), strict=True)
    ]
    return Calibration(layers, {"images": len(images), "model": {}})


def rescored(probe: HeadProbe, spec: str, ablation: str, images: Tensor, labels: Tensor = LABELS) -> Rescoring:
    """Run every round of a spec."""
    probe.choose_masks(spec, ablation)
    probe.calibration = calibrated(probe, images, labels)
    for stage in rescoring_rounds(probe):
        driven(probe, images, labels, stage)
        stage.rescoring.take(stage.rescoring.scores(stage.statistics))
    return stage.rescoring


class Smaller:
    """A float64 copy of a model whose masked heads are filled by plain hooks, with a factor xi of every head."""

    def __init__(self, probe: HeadProbe, masked: set[Head], kind: str, images: Tensor) -> None:
        self.model = copy.deepcopy(probe.backbone).double().train(True).train(False)
        self.layers, self.kind, self.masked = probe.layout.layers, kind, masked
        self.inputs = probe.normalised(images).double()
        self.xi = [torch.ones(layer.heads, dtype=torch.float64, requires_grad=True) for layer in self.layers]
        self.slots: dict[int, Tensor] = {}
        self.whole = self._of_the_whole_model()
        for number, layer in enumerate(self.layers):
            self.model.get_submodule(layer.point).register_forward_pre_hook(self._filled(number))

    def _of_the_whole_model(self) -> list[Tensor]:
        """Every layer's slots in the unmasked model, `[samples, heads, head_dim]`."""
        seen: list[Tensor] = []
        handles = []
        for layer in self.layers:
            shape = (layer.heads, layer.head_dim)
            hook = lambda _, args, shape=shape: seen.append(args[0].detach().reshape(-1, *shape))  # noqa: E731
            handles.append(self.model.get_submodule(layer.point).register_forward_pre_hook(hook))
        with torch.no_grad():
            self.model(self.inputs)
        for handle in handles:
            handle.remove()
        return seen

    def _filled(self, number: int) -> Any:
        layer, whole = self.layers[number], self.whole[number]
        gone = [head for head in range(layer.heads) if (number, head) in self.masked]
        kept = [head for head in range(layer.heads) if head not in gone]
        rest = torch.cat([whole[:, kept].flatten(1), torch.ones(len(whole), 1, dtype=torch.float64)], dim=1)

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            slots = args[0].unflatten(-1, (layer.heads, layer.head_dim)) * self.xi[number][:, None]
            if slots.requires_grad:
                slots.retain_grad()
            self.slots[number] = slots
            out = slots.clone()
            for head in gone:
                if self.kind == "zero":
                    out[..., head, :] = 0
                elif self.kind == "mean" or not kept:
                    out[..., head, :] = whole[:, head].mean(0)
                else:
                    slopes = torch.from_numpy(np.linalg.lstsq(rest.numpy(), whole[:, head].numpy(), rcond=1e-9)[0])
                    now = torch.cat([slots[..., kept, :].flatten(-2), slots.new_ones(*slots.shape[:-2], 1)], dim=-1)
                    out[..., head, :] = now @ slopes
            return (out.flatten(-2),)

        return hook

    def gradients(self, labels: Tensor) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """dL/dxi `[images, heads]` of every layer, image by image, and dL/dz summed over tokens and images."""
        of_xi: list[list[np.ndarray]] = [[] for _ in self.layers]
        towards = [np.zeros((layer.heads, layer.head_dim)) for layer in self.layers]
        for image, label in zip(self.inputs, labels, strict=True):
            for xi in self.xi:
                xi.grad = None
            nn.functional.cross_entropy(self.model(image[None]), label[None]).backward()
            for number, xi in enumerate(self.xi):
                assert xi.grad is not None
                of_xi[number].append(xi.grad.numpy().copy())
                slope = self.slots[number].grad
                assert slope is not None
                towards[number] += slope.reshape(-1, *towards[number].shape).sum(0).numpy()
        return [np.stack(one) for one in of_xi], towards

    def scores(self, name: str, labels: Tensor) -> dict[Head, float]:
        """A score of every head that is left."""
        found: dict[Head, float] = {}
        of_xi, towards = self.gradients(labels)
        with torch.no_grad():
            self.model(self.inputs)
        for number, layer in enumerate(self.layers):
            gradient = of_xi[number]
            slots = self.slots[number].detach().reshape(-1, layer.heads, layer.head_dim).numpy()
            values = {
                "gradient_abs": np.abs(gradient).mean(0),
                "gradient_fisher": (gradient**2).mean(0),
                "taylor_zero": -gradient.mean(0),
                "taylor_mean": (towards[number] / len(labels) * slots.mean(0)).sum(-1) - gradient.mean(0),
            }[name]
            found |= {(number, head): float(values[head]) for head in range(layer.heads)}
        return {head: value for head, value in found.items() if head not in self.masked}


def order_by_hand(probe: HeadProbe, name: str, kind: str, images: Tensor, sign: int, most: int) -> list[Head]:
    """The order of a score that is computed anew after each tenth of the heads, with plain loops."""
    heads = sum(layer.heads for layer in probe.layout.layers)
    order: list[Head] = []
    for step in range(1, 11):
        wanted = int(np.floor(heads * step / 10 + 0.5))
        if len(order) < most and wanted > len(order):
            scores = Smaller(probe, set(order), kind, images).scores(name, LABELS)
            order += sorted(scores, key=lambda head: (sign * scores[head], head))[: wanted - len(order)]
    return order


@pytest.mark.parametrize(
    ("kind", "score", "direction", "ablation", "wanted"),
    [
        ("vit", "gradient_abs", "least", "zero", 6),
        ("vit", "gradient_fisher", "most", "linear", 6),
        ("vit", "taylor_zero", "most", "mean", 4),
        ("swin", "taylor_zero", "least", "linear", 3),
        ("eva", "taylor_mean", "least", "linear", 3),
    ],
)
def test_an_order_is_that_of_plain_hooks_and_autograd_step_by_step(
    kind: str, score: str, direction: str, ablation: str, wanted: int
) -> None:
    probe = tiny_probe(kind)
    images = noise(probe, 7)
    found = rescored(probe, f"grow:calibration:{score}:{direction}:rescored:{wanted}", ablation, images)
    expected = order_by_hand(probe, score, ablation, images, 1 if direction == "least" else -1, wanted)
    assert found.done >= 2
    assert found.kind == ablation
    assert found.found().orders[score, direction][: len(expected)] == expected


@pytest.mark.parametrize("ablation", ["zero", "mean", "linear"])
@pytest.mark.parametrize("name", ["variance_after_projection", "residual_variance_after_projection", "stable_rank"])
def test_variances_are_those_of_the_smaller_model_at_its_output(name: str, ablation: str) -> None:
    probe = tiny_probe("vit")
    images = noise(probe, 7)
    probe.choose_masks(f"grow:calibration:{name}:least:rescored", ablation)
    probe.calibration = calibrated(probe, images)
    stage = next(rescoring_rounds(probe))
    now = stage.rescoring
    driven(probe, images, LABELS, stage)
    found = now.scores(probe.statistics)
    assert now.now is not None
    masked = set(now.now.masked)
    smaller = Smaller(probe, masked, ablation, images)
    with torch.no_grad():
        smaller.model(smaller.inputs)
    place = 0
    for number, layer in enumerate(smaller.layers):
        kept = [head for head in range(layer.heads) if (number, head) not in masked]
        z = smaller.slots[number].detach().reshape(-1, layer.heads, layer.head_dim).numpy()
        z = z - z.mean(0)
        weight = weights_of(probe, number).copy()  # [heads, dim, head_dim]
        if ablation == "linear":  # what is left writes for what is gone: by least squares over the whole model
            whole = smaller.whole[number].numpy() - smaller.whole[number].numpy().mean(0)
            rest = whole[:, kept].reshape(len(whole), -1)
            for gone in set(range(layer.heads)) - set(kept):
                slopes = np.linalg.lstsq(rest, whole[:, gone], rcond=1e-9)[0].reshape(len(kept), layer.head_dim, -1)
                for at, head in enumerate(kept):
                    weight[head] += weight[gone] @ slopes[at].T
        for head in range(layer.heads):
            if head not in kept:
                assert np.isnan(found[place + head])
                continue
            others = [other for other in kept if other != head]
            rest = z[:, others].reshape(len(z), -1)
            own = z[:, head]
            left = own - rest @ np.linalg.lstsq(rest, own, rcond=1e-9)[0] if others else own
            spectral = np.linalg.svd(own @ weight[head].T, compute_uv=False)
            expected = {
                "variance_after_projection": ((own @ weight[head].T) ** 2).sum(1).mean(),
                "residual_variance_after_projection": ((left @ weight[head].T) ** 2).sum(1).mean(),
                "stable_rank": (spectral**2).sum() / spectral[0] ** 2,
            }[name]
            assert found[place + head] == pytest.approx(expected, rel=1e-3)
        place += layer.heads


def test_direct_logits_under_linear_go_through_the_folded_projection() -> None:
    """The logit of the label without a head's slot, everything else as it was behind the heads: their sum is exact."""
    probe = tiny_probe("vit")
    images = noise(probe, 7)
    whole = scored(probe, images, LABELS)
    probe.choose_masks("grow:calibration:direct_logit:least:rescored", "linear")
    probe.calibration = calibrated(probe, images)
    stage = next(rescoring_rounds(probe))
    now = stage.rescoring
    driven(probe, images, LABELS, stage)
    scores = next(one for one in now.statistics(probe.backbone) if isinstance(one, ScoreStatistic))
    assert scores.name == "scores"
    found = now.scores(probe.statistics)
    assert now.now is not None
    masked = set(now.now.masked)
    smaller = Smaller(probe, masked, "linear", images)
    model: Any = smaller.model
    seen: list[Tensor] = []
    model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(smaller.inputs)
    scale = (seen[0].var(-1, correction=0) + model.norm.eps).sqrt()[:, 0]  # [images], of the class token
    classifier = model.head.weight.detach()[LABELS] * model.norm.weight.detach()
    classifier = classifier - classifier.mean(-1, keepdim=True)
    place = 0
    for number, layer in enumerate(smaller.layers):
        weight = weights_of(probe, number).copy()
        kept = [head for head in range(layer.heads) if (number, head) not in masked]
        base = smaller.whole[number].numpy() - smaller.whole[number].numpy().mean(0)
        rest = base[:, kept].reshape(len(base), -1)
        for gone in set(range(layer.heads)) - set(kept):
            slopes = np.linalg.lstsq(rest, base[:, gone], rcond=1e-9)[0].reshape(len(kept), layer.head_dim, -1)
            for at, head in enumerate(kept):
                weight[head] += weight[gone] @ slopes[at].T
        slots = smaller.slots[number].detach()[:, 0]  # [images, heads, head_dim]
        for head in kept:
            added = slots[:, head] @ torch.from_numpy(weight[head]).T
            expected = float(((added * classifier).sum(-1) / scale).mean())
            assert found[place + head] == pytest.approx(expected, rel=1e-3, abs=1e-6)
        place += layer.heads
    assert not np.allclose(
        found[np.isfinite(found)], np.concatenate([one["direct_logit"] for one in whole])[np.isfinite(found)]
    )


# -- steps -------------------------------------------------------------------------------------------------------------


def test_steps_are_tenths_of_the_heads_and_never_empty() -> None:
    assert step_ends(24) == [2, 5, 7, 10, 12, 14, 17, 19, 22, 24]
    assert step_ends(36) == [4, 7, 11, 14, 18, 22, 25, 29, 32, 36]
    assert step_ends(100) == list(range(10, 101, 10))
    assert step_ends(3) == [1, 2, 3]
    assert step_ends(1) == [1]
    for heads in range(1, 200):
        ends = step_ends(heads)
        assert ends == sorted(set(ends))
        assert ends[-1] == heads
        assert len(ends) == min(heads, 10)
        assert all(abs(end - heads * (at + 1) / 10) <= 0.5 for at, end in enumerate(ends)) or heads < 10


def test_rounds_are_counted_as_they_are_run() -> None:
    assert [rounds_of(24, wanted) for wanted in (0, 1, 2, 3, 5, 6, 22, 23, 24)] == [0, 0, 0, 1, 1, 2, 8, 9, 9]
    assert [rounds_of(heads, heads) for heads in (1, 2, 3, 4, 10, 11, 36)] == [0, 0, 1, 2, 8, 8, 9]
    probe = tiny_probe("swin")
    heads = sum(probe.layout.heads_per_layer)
    for wanted in range(1, heads + 1):
        spec = MaskSpec(f"grow:calibration:stable_rank:least:rescored:{wanted}")
        calibration = Calibration([layer_with(np.arange(count, dtype=float)) for count in probe.layout.heads_per_layer])
        found = Rescoring(distinct(spec.rescored, heads), probe.layout, calibration, "zero")
        while found.now is not None:
            scores = np.arange(heads, dtype=float)
            found.take(scores)
        assert found.done == rounds_of(heads, wanted)
        assert len(found.found().orders["stable_rank", "least"]) >= wanted


def layer_with(scores: np.ndarray) -> Any:
    from headprobe.calibration.constants import LayerConstants

    return LayerConstants(1, np.zeros((len(scores), 2)), scores={"stable_rank": scores})


def test_ties_go_by_layer_and_head_and_a_head_without_a_score_is_named() -> None:
    probe = tiny_probe("vit")
    heads = sum(probe.layout.heads_per_layer)
    calibration = Calibration([layer_with(np.zeros(count)) for count in probe.layout.heads_per_layer])
    spec = MaskSpec("grow:calibration:stable_rank:most:rescored")
    found = Rescoring(distinct(spec.rescored, heads), probe.layout, calibration, "zero")
    while found.now is not None:
        found.take(np.zeros(heads))
    every = [(layer, head) for layer, count in enumerate(probe.layout.heads_per_layer) for head in range(count)]
    assert found.found().orders["stable_rank", "most"] == every
    again = Rescoring(distinct(spec.rescored, heads), probe.layout, calibration, "zero")
    broken = np.zeros(heads)
    broken[-1] = np.nan
    with pytest.raises(
        UsageError, match=r"1 head, such as head:\d\.\d, of .* no such score once \d heads? (is|are) masked"
    ):
        again.take(broken)


def test_an_order_that_several_specs_want_is_computed_once_as_far_as_any_needs_it() -> None:
    specs = [
        MaskSpec("grow:calibration:stable_rank:least:rescored:3"),
        MaskSpec("grow:calibration:stable_rank:least:rescored:2-8/2"),
        MaskSpec("grow:calibration:stable_rank:most:rescored"),
    ]
    found = distinct([clause for spec in specs for clause in spec.rescored], 24)
    assert [(clause.direction, wanted) for clause, wanted in found] == [("least", 8), ("most", 24)]


@pytest.mark.parametrize(
    ("ablations", "kind"),
    [
        ("zero", "zero"),
        ("linear,zero", "linear"),
        ("resample:2,linear", "linear"),
        ("resample", "mean"),
        ("optimal", "mean"),
    ],
)
def test_the_first_ablation_that_the_whole_model_settles_masks_the_heads(ablations: str, kind: str) -> None:
    assert rescoring_kind(Ablations(ablations)) == kind


def test_heads_masked_in_the_operator_are_out_of_the_rounds_too() -> None:
    probe = HeadProbe(
        "mvitv2_tiny", pretrained=False, num_classes=10, options={"img_size": 64}, semantics="attention"
    ).eval()
    images = noise(probe, 7)
    probe.choose_masks("grow:calibration:variance_after_projection:least:rescored", "zero")
    assert any(layer.masked_at_operator for layer in probe.layout.layers)
    probe.calibration = calibrated(probe, images)
    stage = next(rescoring_rounds(probe))
    now = stage.rescoring
    driven(probe, images, LABELS, stage)
    found = now.scores(probe.statistics)
    assert now.now is not None
    starts = np.cumsum([0, *probe.layout.heads_per_layer])
    assert {int(starts[layer]) + head for layer, head in now.now.masked} == set(np.flatnonzero(np.isnan(found)))
