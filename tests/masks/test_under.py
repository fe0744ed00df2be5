"""The kinds of ablation before a mask spec: its masks are scored under these alone."""

import copy
import pickle

import pytest

from headprobe.masks import MaskSpec, MaskSpecError, expand_all
from headprobe.masks.ablations import Ablations

TINY = (2, 1, 3)


def scored(*specs: str, ablations: str = "zero,mean,linear") -> dict[str, list[str]]:
    """Return by mask the ablations that it is scored under, in the order of the rows."""
    found: dict[str, list[str]] = {}
    for variant in expand_all([MaskSpec(spec) for spec in specs], TINY, "tiny", Ablations(ablations)):
        found.setdefault(variant.mask.name, []).append(variant.ablation)
    return found


def test_masks_are_scored_under_the_kinds_before_their_spec_alone() -> None:
    found = scored("zero:each:layer", "linear,zero:index:0", "head:2.1")
    assert found == {
        **{f"layer:{layer}": ["zero"] for layer in range(3)},
        "index:0": ["zero", "linear"],
        "head:2.1": ["zero", "mean", "linear"],
    }


def test_a_mask_of_several_specs_is_scored_under_the_kinds_of_all() -> None:
    assert scored("zero:each:layer", "mean:layer:1")["layer:1"] == ["zero", "mean"]
    assert scored("zero:each:layer", "layer:1")["layer:1"] == ["zero", "mean", "linear"]


def test_a_mask_is_tested_only_with_those_that_are_scored_under_the_same_ablation() -> None:
    variants = expand_all([MaskSpec("zero:each:pair"), MaskSpec("each:head")], TINY, "tiny", Ablations("zero,mean"))
    families = {(one.mask.name, one.ablation): one.mask.test_families for one in variants}
    assert families["head:0.0", "mean"] == families["head:0.0", "zero"] == ("each:head",)
    assert families["head:0.0,1", "zero"] == ("each:pair",)
    assert ("head:0.0,1", "mean") not in families


def test_each_draw_of_a_kind_that_draws_is_scored() -> None:
    assert scored("resample:layer:1", "layer:2", ablations="zero,resample:3") == {
        "layer:1": ["resample"] * 3,
        "layer:2": ["zero", *["resample"] * 3],
    }


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("zero:head:2.1+layer:0", "zero:layer:0+head:2.1"),
        ("linear,zero,zero:all", "zero,linear:all"),
        ("mean:none", "mean:none"),
    ],
)
def test_there_is_one_way_to_write_the_kinds(text: str, canonical: str) -> None:
    assert MaskSpec(text).canonical == canonical
    assert MaskSpec(canonical).canonical == canonical
    for copied in (copy.copy(MaskSpec(text)), pickle.loads(pickle.dumps(MaskSpec(text)))):
        assert copied.ablations == MaskSpec(text).ablations != ()


@pytest.mark.parametrize(
    ("text", "caret", "reason"),
    [
        ("zero:", 5, "the mask spec is empty"),
        ("zero:lay:3", 5, "did you mean 'layer'"),
        ("zero:layer:9", 11, "has no layer 9"),
        ("zeros:layer:1", 0, "got 'zeros'"),
        ("keep:zero:layer:1", 5, "got 'zero'"),
        ("zero,position:layer:1", 5, "the run has no ablation position: add it to --ablation, got zero,mean"),
    ],
)
def test_a_caret_stands_under_the_culprit_behind_the_kinds_too(text: str, caret: int, reason: str) -> None:
    with pytest.raises(MaskSpecError) as raised:
        scored(text, ablations="zero,mean")
    assert reason in raised.value.reason
    assert raised.value.column == caret
