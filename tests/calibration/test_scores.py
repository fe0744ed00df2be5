"""The scores of heads, against autograd by hand with one image at a time, and numpy on stored activations."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from headprobe.calibration.constants import LayerConstants
from headprobe.calibration.scores import ScoreStatistic, score_rows
from headprobe.calibration.slots import SlotStatistic
from headprobe.data.stream import ImageBatch
from headprobe.errors import UsageError
from headprobe.masks.tables import SCORES
from headprobe.module import HeadProbe
from headprobe.probe.calibrating import Calibrating
from tests.describe.driving import noise, tiny_probe

GRADIENT_KINDS = ["vit", "vit_registers", "distilled", "beit", "eva", "eva_inner_norm", "dinov3", "swin", "swin_v2"]
LABELS = torch.tensor([1, 7, 3, 7, 0, 2, 9])


def scored(
    probe: HeadProbe, images: Tensor, labels: Tensor, units: tuple[int, ...] = (4, 3), batch: int = 3
) -> list[dict[str, np.ndarray]]:
    """Every layer's scores, as a calibration computes them, under Lightning's inference mode."""
    probe.choose_masks("none", "linear", score_heads=True)
    slots, scores = SlotStatistic(["linear"]), ScoreStatistic(probe.backbone)
    probe.stage = Calibrating(probe, (slots, scores))
    with torch.inference_mode():
        probe.begin_units(len(units))
        probe.plan_passes(batch)
        probe.observe_heads()
        start = 0
        for unit, size in enumerate(units):
            for first in range(0, size, batch):
                rows = torch.arange(first, min(first + batch, size))
                last = first + batch >= size
                step = ImageBatch(images[start + rows].clone(), labels[start + rows].clone(), unit, rows, last)
                probe.validation_step(step, 0)
            start += size
    assert probe.unit_sums is not None
    probe.unit_sums.whole()
    return scores.scores(slots.constants())


class ByHand:
    """A float64 copy of a model with a factor xi of every head, and what its hooks saw."""

    def __init__(self, probe: HeadProbe) -> None:
        self.model = copy.deepcopy(probe.backbone).double().train(True).train(False)
        self.layers = probe.layout.layers
        self.xi = [torch.ones(layer.heads, dtype=torch.float64, requires_grad=True) for layer in self.layers]
        self.slots: dict[int, Tensor] = {}
        self.norm_input: Tensor | None = None
        for number, layer in enumerate(self.layers):
            self.model.get_submodule(layer.point).register_forward_pre_hook(self._scaled(number))

    def _scaled(self, number: int) -> Any:
        layer = self.layers[number]

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            by_head = args[0].unflatten(-1, (layer.heads, layer.head_dim)) * self.xi[number][:, None]
            if by_head.requires_grad:
                by_head.retain_grad()
            self.slots[number] = by_head
            return (by_head.flatten(-2),)

        return hook

    def backward(self, image: Tensor, label: int) -> None:
        """Run one normalised image, and leave its gradients in xi and the slots."""
        for xi in self.xi:
            xi.grad = None
        logits = self.model(image[None].double())
        nn.functional.cross_entropy(logits, torch.tensor([label])).backward()


def by_hand(probe: HeadProbe, images: Tensor, labels: Tensor) -> list[dict[str, np.ndarray]]:
    hand = ByHand(probe)
    of_xi: list[list[np.ndarray]] = [[] for _ in hand.layers]
    towards: list[list[np.ndarray]] = [[] for _ in hand.layers]
    slots: list[list[np.ndarray]] = [[] for _ in hand.layers]
    for image, label in zip(probe.normalised(images), labels.tolist(), strict=True):
        hand.backward(image, label)
        for number in range(len(hand.layers)):
            by_head = hand.slots[number]
            of_head = hand.xi[number].grad
            assert of_head is not None
            assert by_head.grad is not None
            of_xi[number].append(of_head.numpy().copy())
            shape = (-1, *by_head.shape[-2:])
            towards[number].append(by_head.grad.reshape(shape).sum(0).numpy())
            slots[number].append(by_head.detach().reshape(shape).numpy())
    found = []
    for number in range(len(hand.layers)):
        gradient = np.stack(of_xi[number])  # [images, heads]
        mean = np.concatenate(slots[number]).mean(0)  # [heads, head_dim]
        absolute = np.abs(gradient).mean(0)
        found.append(
            {
                "gradient_abs": absolute,
                "gradient_abs_l2": absolute / np.linalg.norm(absolute),
                "gradient_fisher": (gradient**2).mean(0),
                "taylor_zero": -gradient.mean(0),
                # (m - z) . dL/dz, summed over tokens, mean over images
                "taylor_mean": (np.mean(towards[number], axis=0) * mean).sum(-1) - gradient.mean(0),
            }
        )
    return found


@pytest.mark.parametrize("kind", GRADIENT_KINDS)
def test_gradient_scores_are_those_of_autograd_image_by_image(kind: str) -> None:
    probe = tiny_probe(kind)
    images = noise(probe, 7)
    for found, expected in zip(scored(probe, images, LABELS), by_hand(probe, images, LABELS), strict=True):
        for name, values in expected.items():
            scale = np.abs(values).max()
            np.testing.assert_allclose(found[name], values, rtol=1e-3, atol=1e-4 * scale, err_msg=name)


def weights_of(probe: HeadProbe, number: int) -> np.ndarray:
    """The output projection by head `[heads, dim, head_dim]`, layer scale included."""
    layer = probe.layout.layers[number]
    projection: Any = probe.backbone.get_submodule(layer.projection)
    weight = projection.weight.detach().double()
    block: Any = probe.backbone.get_submodule(layer.name.rpartition(".")[0])
    for scale in (getattr(getattr(block, "ls1", None), "gamma", None), getattr(block, "gamma_1", None)):
        if scale is not None:
            weight = weight * scale.detach().double()[:, None]
    return weight.reshape(len(weight), layer.heads, layer.head_dim).permute(1, 0, 2).numpy()


@pytest.mark.parametrize("kind", ["vit", "vit_registers", "beit", "eva", "swin"])
def test_variances_are_the_squared_errors_of_mean_and_linear_ablation_at_the_output(kind: str) -> None:
    probe = tiny_probe(kind)
    images = noise(probe, 7)
    found = scored(probe, images, LABELS)
    hand = ByHand(probe)
    with torch.no_grad():
        hand.model(probe.normalised(images).double())
    for number, layer in enumerate(hand.layers):
        z = hand.slots[number].detach().numpy().reshape(-1, layer.heads, layer.head_dim)
        z = z - z.mean(0)
        weight = weights_of(probe, number)
        for head in range(layer.heads):
            output = z[:, head] @ weight[head].T  # [samples, dim]
            total = (output**2).sum(1).mean()
            assert found[number]["variance_after_projection"][head] == pytest.approx(total, rel=1e-3)
            rest = np.delete(z, head, axis=1).reshape(len(z), -1)
            left = z[:, head] - rest @ np.linalg.lstsq(rest, z[:, head], rcond=None)[0]
            error = ((left @ weight[head].T) ** 2).sum(1).mean()
            assert found[number]["residual_variance_after_projection"][head] == pytest.approx(error, rel=1e-3)
            spectral = np.linalg.svd(output, compute_uv=False)
            rank = (spectral**2).sum() / spectral[0] ** 2
            assert found[number]["stable_rank"][head] == pytest.approx(rank, rel=1e-3)


@pytest.mark.parametrize("kind", ["vit", "vit_registers", "eva", "dinov3", "clip"])
def test_direct_logits_are_the_heads_shares_of_the_label_s_logit(kind: str) -> None:
    probe = tiny_probe(kind)
    images = noise(probe, 7)
    found = scored(probe, images, LABELS)
    hand = ByHand(probe)
    model: Any = hand.model
    norm = model.norm if not isinstance(model.norm, nn.Identity) else model.fc_norm
    seen: list[Tensor] = []
    norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(probe.normalised(images).double())
    stream = seen[0]  # [images, tokens, dim], or pooled [images, dim]
    prefix = 0 if getattr(model, "pool_include_prefix", False) else model.num_prefix_tokens
    for number, layer in enumerate(hand.layers):
        z = hand.slots[number].detach()  # [images, tokens, heads, head_dim]
        weight = torch.from_numpy(weights_of(probe, number))
        for head in range(layer.heads):
            added = z[:, :, head] @ weight[head].T  # [images, tokens, dim]
            if stream.dim() == 2:
                added = added[:, prefix:].mean(1)
            deviation = stream.std(-1, correction=0, keepdim=True).square().add(norm.eps).sqrt()
            through = (added - added.mean(-1, keepdim=True)) / deviation * norm.weight.detach().double()
            if stream.dim() == 3:
                through = through[:, prefix:].mean(1) if model.global_pool == "avg" else through[:, 0]
            logits = through @ model.head.weight.detach().T  # [images, classes]
            expected = float(logits[torch.arange(7), LABELS].mean())
            assert found[number]["direct_logit"][head] == pytest.approx(expected, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("kind", ["swin", "beit", "eva_inner_norm", "distilled"])
def test_where_the_stream_is_not_a_sum_over_heads_direct_logits_are_empty_with_the_reason(kind: str) -> None:
    probe = tiny_probe(kind)
    found = scored(probe, noise(probe, 7), LABELS)
    assert all(np.isnan(layer["direct_logit"]).all() for layer in found)
    (reasons,) = [one.undefined()["direct_logit"] for one in probe.statistics if isinstance(one, ScoreStatistic)]
    assert list(reasons.values()) == [list(range(len(found)))]


def test_batches_rows_and_units_change_no_score() -> None:
    images = noise(tiny_probe("vit"), 7)
    found = []
    for budget, units, batch in ((None, (4, 3), 3), (2, (7,), 7), (1, (1, 1, 5), 2)):
        probe = tiny_probe("vit")
        probe.row_budget = budget
        found.append(scored(probe, images, LABELS, units, batch))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            for name in SCORES:
                np.testing.assert_allclose(one[name], two[name], rtol=1e-4, atol=1e-7, err_msg=name)


def test_images_without_a_label_count_for_variances_only() -> None:
    probe = tiny_probe("vit")
    images = noise(probe, 7)
    some = LABELS.clone()
    some[[1, 5]] = -1
    found = scored(probe, images, some)
    labelled = by_hand(probe, images[some >= 0], some[some >= 0])
    whole = scored(tiny_probe("vit"), images, LABELS)
    for number, layer in enumerate(found):
        for name in ("gradient_abs", "gradient_fisher", "taylor_zero"):
            np.testing.assert_allclose(layer[name], labelled[number][name], rtol=1e-3, atol=1e-7)
        np.testing.assert_allclose(layer["stable_rank"], whole[number]["stable_rank"], rtol=1e-5)


def test_without_any_label_the_scores_that_need_none_are_there() -> None:
    probe = tiny_probe("vit")
    found = scored(probe, noise(probe, 7), torch.full((7,), -1))
    for layer in found:
        empty = [name for name in SCORES if np.isnan(layer[name]).all()]
        assert empty == [name for name in SCORES if name.startswith(("gradient", "taylor", "direct"))]
        assert not np.isnan(layer["residual_variance_after_projection"]).any()


def test_a_constant_head_has_no_variance_and_no_rank() -> None:
    probe = tiny_probe("vit")
    attention = probe.backbone.blocks[1].attn  # type: ignore[union-attr,index]
    width = probe.layout.layers[1].head_dim
    with torch.no_grad():  # the values of head 0 become their bias
        attention.qkv.weight[2 * attention.qkv.out_features // 3 :][:width] = 0
    found = scored(probe, noise(probe, 7), LABELS)[1]
    assert found["variance_after_projection"][0] == pytest.approx(0, abs=1e-9)
    assert found["residual_variance_after_projection"][0] == pytest.approx(0, abs=1e-9)
    assert found["variance_after_projection"][1] > 1e-3


def test_a_model_that_cuts_gradients_off_is_refused_by_name() -> None:
    probe = tiny_probe("vit")
    plain = probe.backbone.forward_head
    probe.backbone.forward_head = lambda x, **_: plain(x.detach())  # type: ignore[assignment,operator]
    with pytest.raises(UsageError, match="the scores of heads follow gradients back to the heads"):
        scored(probe, noise(probe, 7), LABELS)


def test_the_model_is_left_as_it_was() -> None:
    probe = tiny_probe("swin")
    before = {name: value.clone() for name, value in probe.backbone.state_dict().items()}
    hooks = sum(len(part._forward_pre_hooks) for part in probe.backbone.modules())
    wanted = [parameter.requires_grad for parameter in probe.backbone.parameters()]
    scored(probe, noise(probe, 7), LABELS)
    assert hooks == sum(len(part._forward_pre_hooks) for part in probe.backbone.modules())
    assert wanted == [parameter.requires_grad for parameter in probe.backbone.parameters()]
    assert all(parameter.grad is None for parameter in probe.backbone.parameters())
    for name, value in probe.backbone.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_row_per_head_in_the_order_of_layers() -> None:
    probe = tiny_probe("swin")
    layers = [
        LayerConstants(1, np.zeros((layer.heads, layer.head_dim)), scores={"stable_rank": np.arange(0.5, layer.heads)})
        for layer in probe.layout.layers
    ]
    rows = score_rows(layers, 7)
    assert [(row["layer"], row["head"]) for row in rows] == [
        (layer, head) for layer, heads in enumerate(probe.layout.heads_per_layer) for head in range(heads)
    ]
    assert all(row == {**row, "images": 7, "stable_rank": row["head"] + 0.5} for row in rows)
    assert score_rows([LayerConstants(1, np.zeros((2, 3)))], 7) == []
