"""The rounds that seek optimal constants: losses and gradients against plain hooks, and how a search ends."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from headprobe.backbone.growing.growing_pass import GrowingPass
from headprobe.calibration import optimal
from headprobe.calibration.constants import Calibration, LayerConstants
from headprobe.calibration.fills import stand_in
from headprobe.calibration.optimal import Head, Round, Search, TrialSums, in_words, refuse_missing, warning_of
from headprobe.errors import UsageError
from headprobe.module import HeadProbe
from headprobe.probe.rounds import SearchRound, search_rounds
from tests.describe.driving import noise, tiny_probe

KINDS = ["vit", "distilled", "beit", "eva_inner_norm", "swin", "swin_v2"]


def begun(probe: HeadProbe, spec: str = "each:head", images: int = 4, **calibration: Any) -> Search:
    """Begin a search around random means, with the passes of its first round planned as Lightning would."""
    generator = np.random.default_rng(5)
    probe.choose_masks(spec, "optimal")
    probe.calibration = Calibration(
        [
            LayerConstants(1, generator.normal(size=layer.mean.shape) / 4, **calibration)
            for layer in stand_in(probe.layout).layers
        ]
    )
    probe.stage = stage = next(search_rounds(probe))
    with torch.inference_mode():
        probe.plan_passes(images)
    return stage.search


def losses_of(probe: HeadProbe, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    with torch.inference_mode():  # as under Lightning, which makes inference tensors of the images too
        assert isinstance(probe.stage, SearchRound)
        return probe.stage.trial_losses(images.clone(), labels.clone())


def by_hooks(probe: HeadProbe, images: Tensor, labels: Tensor, head: Head, constant: np.ndarray) -> tuple[float, Any]:
    """The summed NLL of one head's constant and its gradient, by a plain hook on a float64 copy."""
    model = copy.deepcopy(probe.backbone).double().eval().train(False)
    for part in model.modules():
        part.training = True  # empties timm's caches, whose tensors come from another precision
        part.train(False)
    layer = probe.layout.layers[head[0]]
    leaf = torch.tensor(constant[: layer.head_dim], dtype=torch.float32).double().requires_grad_()

    def replaced(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        slots = args[0].clone()
        slots[..., head[1] * layer.head_dim : (head[1] + 1) * layer.head_dim] = leaf
        return (slots,)

    handle = model.get_submodule(layer.point).register_forward_pre_hook(replaced)
    logits = model(probe.normalised(images).double())
    handle.remove()
    loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
    loss.backward()
    assert leaf.grad is not None
    return float(loss.detach()), leaf.grad.numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_plain_hooks(kind: str) -> None:
    probe = tiny_probe(kind)
    search = begun(probe)
    images, labels = noise(probe, 4), torch.tensor([1, 7, 3, 7])
    losses, gradients = losses_of(probe, images, labels)
    for row, head in enumerate(search.now.heads):
        loss, gradient = by_hooks(probe, images, labels, head, search.now.trial[row])
        assert float(losses[row]) == pytest.approx(loss, rel=1e-5)
        found = gradients[row].numpy()
        np.testing.assert_allclose(found[: len(gradient)], gradient, atol=2e-5 * max(1, np.abs(gradient).max()))
        assert not found[len(gradient) :].any()


def test_rows_and_waves_change_no_loss_and_no_gradient() -> None:
    images, labels = noise(tiny_probe("vit"), 5), torch.arange(5)
    found = []
    for budget in (None, 3):
        probe = tiny_probe("vit")
        probe.row_budget = budget
        begun(probe)
        found.append(losses_of(probe, images, labels))
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-5)


def test_only_the_classes_of_the_data_count() -> None:
    probe = tiny_probe("vit")
    search = begun(probe, "head:1.0")
    probe.valid_classes = torch.tensor([1, 3, 7])
    images, labels = noise(probe, 3), torch.tensor([1, 7, 3])
    losses, _ = losses_of(probe, images, labels)
    probe.calibration = search.found()
    probe.judge()
    probe.calibration.layers[1].optimal[0] = search.now.trial[0]  # type: ignore[index]
    probe.plan_passes(3)
    logits = probe.masked_logits(images)[1][:, [1, 3, 7]]
    expected = nn.functional.cross_entropy(logits, torch.tensor([0, 2, 1]), reduction="sum")
    assert float(losses[0]) == pytest.approx(float(expected), rel=1e-5)


def test_the_model_is_left_as_it_was() -> None:
    probe = tiny_probe("swin")
    frozen = next(probe.backbone.parameters())
    frozen.requires_grad_(False)
    begun(probe)
    before = [(one.requires_grad, one.grad) for one in probe.backbone.parameters()]
    attributes = [set(vars(part)) for part in probe.backbone.modules()]
    losses_of(probe, noise(probe, 2), torch.tensor([0, 1]))
    assert [(one.requires_grad, one.grad) for one in probe.backbone.parameters()] == before
    assert [set(vars(part)) for part in probe.backbone.modules()] == attributes
    assert not frozen.requires_grad
    assert not any(part._forward_pre_hooks for part in probe.backbone.modules())
    with torch.inference_mode():
        probe.backbone(probe.normalised(noise(probe, 1)))


class WithoutGradients(nn.Module):
    """A module that hides what it does from autograd."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            out: Tensor = self.inside(x)
        return out


def test_a_model_that_cuts_gradients_off_is_refused_with_the_layer() -> None:
    probe = tiny_probe("vit")
    probe.backbone.norm = WithoutGradients(probe.backbone.norm)  # type: ignore[arg-type]
    begun(probe, "head:1.0")
    with pytest.raises(UsageError, match=r"optimal follows gradients .* choose mean or linear.* got none at layer 'bl"):
        losses_of(probe, noise(probe, 2), torch.tensor([0, 1]))


def test_memory_that_ends_in_a_round_halves_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = tiny_probe("vit")
    images, labels = noise(probe, 6), torch.arange(6)
    begun(probe, images=6)
    expected = losses_of(probe, images, labels)
    real = GrowingPass.logits
    seen = []

    def scarce(self: GrowingPass, images: Tensor, plan: Any, taps: Any = ()) -> Tensor:
        seen.append(plan.most_rows)
        if plan.most_rows > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, images, plan, taps)

    monkeypatch.setattr(GrowingPass, "logits", scarce)
    with pytest.warns(UserWarning, match="out of memory with"):
        found = losses_of(probe, images, labels)
    assert min(seen) <= 3 < max(seen)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


# -- the search --------------------------------------------------------------------------------------------------------


def means(heads: int = 2, dims: tuple[int, ...] = (3, 5)) -> Calibration:
    return Calibration([LayerConstants(1, np.full((heads, dim), 0.5)) for dim in dims], {"images": 7})


def evaluated(search: Search, curvature: float = 1.0) -> TrialSums:
    """The sums over 7 images of a bowl around 1; that of layer 0 is flat from the start."""
    now = search.now
    sums = TrialSums(len(now.heads), search.dim)
    losses, gradients = torch.zeros(len(now.heads)), torch.zeros(len(now.heads), search.dim)
    for row, (layer, _) in enumerate(now.heads):
        dim = search.calibration.layers[layer].mean.shape[1]
        off = torch.from_numpy(now.trial[row, :dim] - 1) * (curvature if layer else 0)
        losses[row], gradients[row, :dim] = off @ off, 2 * off
    sums.update(7 * losses, 7 * gradients, 7)
    return sums


def run(search: Search) -> None:
    while search.now.heads:
        search.now = search.take(evaluated(search))
        search.done += 1


def test_each_head_ends_by_itself_at_its_minimum() -> None:
    search = Search([(0, 1), (1, 0), (1, 1)], means())
    assert len(search.now.heads) == 3
    search.now, search.done = search.take(evaluated(search)), 1
    assert search.now.heads == ((1, 0), (1, 1))
    run(search)
    found = search.found()
    flat, bowl = (layer.optimal for layer in found.layers)
    assert flat is not None
    assert bowl is not None
    np.testing.assert_array_equal(flat, [[np.nan] * 3, [0.5] * 3])
    np.testing.assert_allclose(bowl, 1, atol=1e-3)
    assert found.about["images"] == 7
    by_head = found.about["optimal"]["heads"]
    assert [one["rounds"] for one in by_head] == [1, search.done, search.done]
    assert all(one["converged"] for one in by_head)
    assert by_head[1]["nll_of_mean"] == pytest.approx(1.25)
    assert in_words(found.about["optimal"]) == f"3 of 3 heads converged within {search.done} rounds"
    assert warning_of(found) == ""


def test_heads_that_have_not_converged_are_named_and_keep_their_best(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimal, "MOST_ROUNDS", 2)
    search = Search([(0, 0), (1, 1)], means())
    run(search)
    found = search.found()
    assert in_words(found.about["optimal"]) == "1 of 2 heads converged within 2 rounds"
    assert "within 2 rounds for 1 head (1.1): the best constant so far" in warning_of(found)
    last = found.about["optimal"]["heads"][1]
    assert last["nll"] <= last["nll_of_mean"]


def test_a_round_travels_whole_and_its_identity_changes_with_one_bit() -> None:
    one = Round(((0, 1), (2, 0)), np.random.default_rng(0).normal(size=(2, 4)))
    other = Round.from_bytes(one.to_bytes())
    assert (other.heads, other.identity()) == (one.heads, one.identity())
    other.trial[1, 3] = np.nextafter(other.trial[1, 3], 2)
    assert other.identity() != one.identity()


def test_constants_of_other_heads_are_refused() -> None:
    probe = tiny_probe("vit")
    search = begun(probe, "head:1.0")
    found = search.found()
    probe.choose_masks(["head:1.0"], "optimal")
    refuse_missing(found, probe.variants)
    probe.choose_masks(["head:1.0+head:0.1", "head:0.0"], "optimal")
    with pytest.raises(UsageError, match=r"none for 2 heads of 3: .*, got no constant for 0\.0, 0\.1"):
        refuse_missing(found, probe.variants)
