"""The oracles are timm, scikit-learn, scipy and float64 numpy; every logit is drawn from a seed."""

import itertools
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import special, stats
from sklearn.metrics import confusion_matrix, log_loss, top_k_accuracy_score
from timm.utils.metrics import accuracy as timm_accuracy
from torch import Tensor, nn

from headprobe.errors import UsageError
from headprobe.metrics.accuracy.paired_accuracy import GROUPS, PairedAccuracy

MASKS, IMAGES, CLASSES = 3, 41, 11


def draw(images: int = IMAGES, classes: int = CLASSES, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits of masks that disturb a baseline, and labels it is often right about."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=generator)
    baseline = torch.randn(images, classes, generator=generator)
    baseline[torch.arange(images), labels] += 1.5
    noise = torch.randn(MASKS, images, classes, generator=generator)
    return torch.cat([baseline[None], baseline + noise]), labels


def measure(logits: Tensor, labels: Tensor, per_class: bool = False) -> PairedAccuracy:
    metric = PairedAccuracy(len(logits) - 1, logits.shape[2], per_class)
    metric.update(logits, labels, groups_of(labels))
    return metric


def groups_of(labels: Tensor) -> Tensor:
    """Some group of each image."""
    return torch.arange(len(labels)) * 7 % GROUPS


def assert_close(arrays: dict[str, NDArray[Any]], expected: dict[str, NDArray[Any]], tolerance: float) -> None:
    """Floats within a relative tolerance, integers equal."""
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        np.testing.assert_allclose(
            array, expected[name], rtol=tolerance if array.dtype.kind == "f" else 0, err_msg=name
        )


def same(one: PairedAccuracy, other: PairedAccuracy) -> bool:
    """Equal to the last bit."""
    ours, theirs = one.to_arrays(), other.to_arrays()
    return ours.keys() == theirs.keys() and all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return draw()


@pytest.mark.parametrize("classes", [2, 4, 5, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_top1_and_top5_are_timms(classes: int, dtype: torch.dtype) -> None:
    logits, labels = draw(classes=classes)
    logits = logits.to(dtype)
    scores = measure(logits, labels).compute()
    expected = [[float(top) for top in timm_accuracy(row, labels, topk=(1, 5))] for row in logits]
    np.testing.assert_allclose(100 * np.stack([scores.top1, scores.top5], axis=1), expected, rtol=1e-6)


@pytest.mark.parametrize(("k", "name"), [(1, "top1_count"), (5, "top5_count")])
def test_top_counts_are_scikit_learns(batch: tuple[Tensor, Tensor], k: int, name: str) -> None:
    logits, labels = batch
    expected = [
        top_k_accuracy_score(labels, row, k=k, normalize=False, labels=range(CLASSES)) for row in logits.numpy()
    ]
    assert getattr(measure(logits, labels).compute(), name).tolist() == expected


def test_nll_is_scikit_learns_log_loss(batch: tuple[Tensor, Tensor]) -> None:
    logits, labels = batch
    rows = special.softmax(logits.double().numpy(), axis=2)
    expected = [log_loss(labels, row, labels=range(CLASSES)) for row in rows]
    np.testing.assert_allclose(measure(logits, labels).compute().nll, expected, rtol=1e-12)


def test_kl_is_the_relative_entropy_in_float64(batch: tuple[Tensor, Tensor]) -> None:
    logits, labels = batch
    rows = special.softmax(logits.double().numpy(), axis=2)
    expected = special.rel_entr(rows[0], rows).sum(axis=2).mean(axis=1)
    np.testing.assert_allclose(measure(logits, labels).compute().kl_nats, expected, rtol=1e-12)


def test_nll_rise_and_its_interval_are_those_of_the_paired_differences(batch: tuple[Tensor, Tensor]) -> None:
    logits, labels = batch
    nll = -special.log_softmax(logits.double().numpy(), axis=2)[:, np.arange(IMAGES), labels.numpy()]
    scores = measure(logits, labels).compute()
    for row in range(1, 1 + MASKS):
        rises = nll[row] - nll[0]
        # The formulas of docs/results.md, with scipy's moments.
        skewness, excess = stats.skew(rises), stats.kurtosis(rises)
        freedom = min(2 / (2 / (IMAGES - 1) + excess / IMAGES), IMAGES - 1)
        lean = skewness * (2 * stats.t.ppf(0.975, IMAGES - 1) ** 2 + 1) / (6 * np.sqrt(IMAGES))
        error = stats.sem(rises)
        low = rises.mean() - error * (stats.t.ppf(0.975, freedom) + max(-lean, 0))
        high = rises.mean() + error * (stats.t.ppf(0.975, freedom) + max(lean, 0))
        got = scores.nll_rise[row], scores.nll_rise_low[row], scores.nll_rise_high[row]
        np.testing.assert_allclose(got, [rises.mean(), low, high], rtol=1e-9)


def test_flips_and_agreement_are_those_of_the_predictions(batch: tuple[Tensor, Tensor]) -> None:
    logits, labels = batch
    predictions = logits.numpy().argmax(axis=2)
    right = predictions == labels.numpy()
    scores = measure(logits, labels).compute()
    np.testing.assert_array_equal(scores.right_to_wrong, (right[0] & ~right).sum(axis=1))
    np.testing.assert_array_equal(scores.wrong_to_right, (right & ~right[0]).sum(axis=1))
    np.testing.assert_allclose(scores.agreement, (predictions == predictions[0]).mean(axis=1))


def test_sums_of_a_group_are_those_of_its_images(batch: tuple[Tensor, Tensor]) -> None:
    logits, labels = batch
    groups = groups_of(labels).numpy() % 5
    metric = PairedAccuracy(MASKS, CLASSES)
    metric.update(logits, labels, torch.tensor(groups))
    scores = metric.compute()
    nll = -special.log_softmax(logits.double().numpy(), axis=2)[:, np.arange(IMAGES), labels.numpy()]
    right = logits.numpy().argmax(axis=2) == labels.numpy()
    for group in range(GROUPS):
        own = groups == group
        assert scores.group_images[group] == own.sum()
        np.testing.assert_array_equal(scores.group_top1_count[:, group], right[:, own].sum(axis=1))
        np.testing.assert_allclose(scores.group_nll[:, group], nll[:, own].sum(axis=1), rtol=1e-12)


def test_groups_add_up_to_the_whole(batch: tuple[Tensor, Tensor]) -> None:
    scores = measure(*batch).compute()
    assert scores.group_images.sum() == IMAGES
    np.testing.assert_array_equal(scores.group_top1_count.sum(axis=1), scores.top1_count)
    np.testing.assert_allclose(scores.group_nll.sum(axis=1) / IMAGES, scores.nll, rtol=1e-13)


def test_error_on_groups_that_are_not_one_per_image(batch: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(UsageError, match=rf"groups must be \[{IMAGES}\], one per image, got \[3\]$"):
        PairedAccuracy(MASKS, CLASSES).update(*batch, torch.zeros(3, dtype=torch.int64))


def test_per_class_counts_are_the_diagonal_of_the_confusion_matrix(batch: tuple[Tensor, Tensor]) -> None:
    logits, labels = batch
    scores = measure(logits, labels, per_class=True).compute()
    matrices = [confusion_matrix(labels, row.argmax(axis=1), labels=range(CLASSES)) for row in logits.numpy()]
    np.testing.assert_array_equal(scores.class_images, matrices[0].sum(axis=1))
    np.testing.assert_array_equal(scores.class_top1_count, [matrix.diagonal() for matrix in matrices])


def test_equal_logits_have_no_divergence_to_the_last_bit(batch: tuple[Tensor, Tensor]) -> None:
    logits, labels = batch
    scores = measure(logits[[0, 0]], labels).compute()
    assert (scores.kl_nats[1], scores.nll_rise[1], scores.agreement[1]) == (0, 0, 1)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 6e4), (torch.float32, 1e30)])
def test_large_logits_keep_finite_likelihoods(dtype: torch.dtype, size: float) -> None:
    logits = torch.tensor([[[size, -size]], [[-size, size]]], dtype=dtype)
    scores = measure(logits, torch.tensor([0])).compute()
    np.testing.assert_allclose([scores.nll[1], scores.kl_nats[1]], 2 * float(logits[0, 0, 0]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_integer_type_count_alike(batch: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    logits, labels = batch
    assert same(measure(logits, labels.to(dtype), True), measure(logits, labels, True))


@pytest.mark.parametrize("value", [-1, CLASSES, -100])
def test_error_names_a_label_outside_the_classes_and_their_range(batch: tuple[Tensor, Tensor], value: int) -> None:
    logits, labels = batch
    labels[7] = value
    with pytest.raises(UsageError, match=rf"0 to {CLASSES - 1}, .* got {value}$"):
        measure(logits, labels)


@pytest.mark.parametrize(
    ("logits", "labels", "culprit"),
    [
        (torch.zeros(5, CLASSES), torch.zeros(5).long(), rf"logits must be \[4, images, 11\], got \[5, {CLASSES}\]"),
        (torch.zeros(3, 5, CLASSES), torch.zeros(5).long(), r"got \[3, 5, 11\]"),
        (torch.zeros(4, 5, 12), torch.zeros(5).long(), r"got \[4, 5, 12\]"),
        (torch.zeros(4, 5, CLASSES), torch.zeros(4).long(), r"labels must be \[5\], .* got \[4\]"),
        (torch.zeros(4, 5, CLASSES), torch.zeros(5, 1).long(), r"got \[5, 1\]"),
        (torch.zeros(4, 5, CLASSES).long(), torch.zeros(5).long(), r"logits must be floating point, got torch.int64"),
        (torch.zeros(4, 5, CLASSES), torch.zeros(5), r"labels must be integers, got torch.float32"),
        (torch.zeros(4, 5, CLASSES), torch.zeros(5).bool(), r"labels must be integers, got torch.bool"),
    ],
)
def test_error_on_a_batch_of_the_wrong_shape_or_type(logits: Tensor, labels: Tensor, culprit: str) -> None:
    with pytest.raises(UsageError, match=culprit):
        PairedAccuracy(MASKS, CLASSES).update(logits, labels, groups_of(labels))


def test_a_refused_batch_leaves_no_trace(batch: tuple[Tensor, Tensor]) -> None:
    logits, labels = batch
    metric = measure(logits, labels)
    with pytest.raises(UsageError):
        metric.update(logits, labels + CLASSES, groups_of(labels))
    assert same(metric, measure(logits, labels))


@pytest.mark.parametrize(("masks", "classes", "culprit"), [(-1, 5, "masks.*got -1$"), (0, 0, "classes.*got 0$")])
def test_error_on_sizes_that_cannot_be(masks: int, classes: int, culprit: str) -> None:
    with pytest.raises(UsageError, match=culprit):
        PairedAccuracy(masks, classes)


def test_a_batch_without_images_adds_nothing(batch: tuple[Tensor, Tensor]) -> None:
    logits, labels = batch
    metric = measure(logits, labels, per_class=True)
    metric.update(logits[:, :0], labels[:0], groups_of(labels[:0]))
    assert same(metric, measure(logits, labels, per_class=True))


def test_scores_of_no_image_are_undefined_and_raise_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = PairedAccuracy(MASKS, CLASSES).compute()
    assert scores.images.tolist() == [0] * (1 + MASKS)
    assert np.isnan(scores.top1).all()


@pytest.mark.parametrize(("poison", "place"), [(float("nan"), 0), (float("inf"), 0), (float("-inf"), 1)])
def test_an_image_with_a_nonfinite_logit_is_counted_and_wrong(
    batch: tuple[Tensor, Tensor], poison: float, place: int
) -> None:
    logits, labels = batch
    labels[5] = 0
    logits[0, 5, 0] = 9.0
    logits[1] = logits[0]
    logits[1, 5, place] = poison  # topk alone would still call the image right
    scores = measure(logits, labels).compute()
    assert scores.nonfinite.tolist() == [0, 1, 0, 0]
    assert (scores.right_to_wrong[1], scores.wrong_to_right[1]) == (1, 0)
    assert scores.agreement[1] == pytest.approx((IMAGES - 1) / IMAGES)
    assert np.isfinite(scores.kl_nats).tolist() == [True, False, True, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_keep_their_precision_when_the_module_is_cast(batch: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    module = nn.ModuleDict({"metric": measure(*batch)})
    module.to(dtype)  # what Lightning's bf16-true does
    module.half().float().type(dtype)
    metric = module["metric"]
    assert isinstance(metric, PairedAccuracy)
    metric.set_dtype(dtype)
    assert same(metric, measure(*batch))
    metric.reset()
    assert {state.dtype for state in metric.metric_state.values() if isinstance(state, Tensor)} == {
        torch.int64,
        torch.float64,
    }


def test_inference_mode_can_be_entered_and_left_between_batches(batch: tuple[Tensor, Tensor]) -> None:
    metric = PairedAccuracy(MASKS, CLASSES, per_class=True)
    with torch.inference_mode():
        metric.update(*batch, groups_of(batch[1]))
        metric.reset()
        metric.update(*batch, groups_of(batch[1]))
    metric.update(*batch, groups_of(batch[1]))
    with torch.inference_mode():
        metric.update(*batch, groups_of(batch[1]))
    assert metric.compute().images[0] == 3 * IMAGES


def test_sums_hold_no_graph(batch: tuple[Tensor, Tensor]) -> None:
    logits, labels = batch
    assert not measure(logits.requires_grad_(), labels).nll.requires_grad


@given(st.lists(st.integers(0, IMAGES), max_size=6), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=40)
def test_parts_merged_in_any_order_give_the_whole(cuts: list[int], order: random.Random) -> None:
    logits, labels = draw()
    edges = [0, *sorted(cuts), IMAGES]
    groups = groups_of(labels)
    parts = []
    for a, b in itertools.pairwise(edges):
        part = PairedAccuracy(MASKS, CLASSES, per_class=True)
        part.update(logits[:, a:b], labels[a:b], groups[a:b])
        parts.append(part)
    order.shuffle(parts)
    total = PairedAccuracy(MASKS, CLASSES, per_class=True)
    for part in parts:
        total.merge(part)
    whole = measure(logits, labels, per_class=True)
    assert_close(total.to_arrays(), whole.to_arrays(), tolerance=1e-13)


def test_merging_in_one_order_gives_the_same_bits(batch: tuple[Tensor, Tensor]) -> None:
    logits, labels = batch
    streamed = PairedAccuracy(MASKS, CLASSES)
    merged = PairedAccuracy(MASKS, CLASSES)
    for start in range(0, IMAGES, 7):
        part = logits[:, start : start + 7], labels[start : start + 7]
        streamed.update(*part, groups_of(part[1]))
        merged.merge(measure(*part))
    assert same(streamed, merged)


def test_scores_include_what_was_merged_after_an_earlier_look(batch: tuple[Tensor, Tensor]) -> None:
    metric = measure(*batch)
    metric.compute()
    metric.merge(measure(*batch))
    assert metric.compute().images[0] == 2 * IMAGES


@pytest.mark.parametrize(("masks", "classes", "per_class"), [(2, 11, False), (3, 12, False), (3, 11, True)])
def test_error_on_merging_another_shape(masks: int, classes: int, per_class: bool) -> None:
    with pytest.raises(ValueError, match=rf"\(3, 11, False\) here, got \({masks}, {classes}, {per_class}\)$"):
        PairedAccuracy(MASKS, CLASSES).merge(PairedAccuracy(masks, classes, per_class))


@pytest.mark.parametrize("per_class", [False, True])
def test_arrays_restore_the_metric_to_the_last_bit(
    batch: tuple[Tensor, Tensor], per_class: bool, tmp_path: Path
) -> None:
    metric = measure(*batch, per_class=per_class)
    np.savez(tmp_path / "unit.npz", **metric.to_arrays())  # type: ignore[arg-type]  # numpy's stub takes them for allow_pickle
    with np.load(tmp_path / "unit.npz") as arrays:
        restored = metric.empty().from_arrays(dict(arrays))
    assert same(restored, metric)
    restored.update(*batch, groups_of(batch[1]))
    assert restored.compute().images[0] == 2 * IMAGES


def test_arrays_are_copies(batch: tuple[Tensor, Tensor]) -> None:
    metric = measure(*batch)
    metric.to_arrays()["top1"][:] = 0
    assert same(metric, measure(*batch))


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"top5": None}, "the arrays must be .*top5.*, got .*top1, wrong_to_right$"),
        ({"extra": np.zeros(4)}, "the arrays must be .*, got .*extra"),
        ({"nll": np.zeros(4, dtype=np.float32)}, r"'nll' must be float64 \[4\], got float32 \[4\]$"),
        ({"kl": np.zeros(5)}, r"'kl' must be float64 \[4\], got float64 \[5\]$"),
    ],
)
def test_error_on_arrays_of_another_metric(
    batch: tuple[Tensor, Tensor], changes: dict[str, NDArray[np.float64] | None], culprit: str
) -> None:
    metric = measure(*batch)
    arrays = metric.to_arrays() | changes
    with pytest.raises(ValueError, match=culprit):
        metric.from_arrays({name: array for name, array in arrays.items() if array is not None})


@pytest.mark.parametrize(
    ("masks", "classes", "per_class", "culprit"),
    [
        (2, 11, False, r"'top1' must be int64 \[4\], got int64 \[3\]$"),
        (3, 12, False, r"'classes' must be 11, got 12$"),
        (3, 11, True, r"the arrays must be .*, got .*class_images"),
    ],
)
def test_error_on_arrays_of_other_masks_or_classes(masks: int, classes: int, per_class: bool, culprit: str) -> None:
    arrays = PairedAccuracy(masks, classes, per_class).to_arrays()
    with pytest.raises(ValueError, match=culprit):
        PairedAccuracy(MASKS, CLASSES).from_arrays(arrays)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_counts_like_the_cpu(batch: tuple[Tensor, Tensor]) -> None:
    metric = PairedAccuracy(MASKS, CLASSES, per_class=True).cuda()
    metric.update(*(tensor.cuda() for tensor in (*batch, groups_of(batch[1]))))
    assert_close(metric.to_arrays(), measure(*batch, per_class=True).to_arrays(), tolerance=1e-12)
