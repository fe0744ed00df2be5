import json
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headprobe.errors import UsageError
from headprobe.masks import HeadMask

SHAPE = (2, 4, 3)


def mask(*heads: tuple[int, int]) -> HeadMask:
    return HeadMask(SHAPE, frozenset(heads))


def test_keep_is_false_at_masked_heads_and_true_at_others_and_at_padding() -> None:
    expected = np.ones((3, 4), dtype=bool)
    expected[0, 1] = expected[2, 2] = False
    np.testing.assert_array_equal(mask((0, 1), (2, 2)).keep().numpy(), expected)


def test_count_and_first_layer() -> None:
    assert (mask((2, 0), (1, 3)).count, mask((2, 0), (1, 3)).first_layer) == (2, 1)
    assert (mask().count, mask().first_layer) == (0, None)


def test_to_json_sorts_layers_by_number_and_heads() -> None:
    shape = (1,) * 11
    heads = frozenset({(10, 0), (9, 0)})
    assert json.dumps(HeadMask(shape, heads).to_json()) == '{"masked_heads": {"9": [0], "10": [0]}}'
    assert mask((1, 3), (1, 0)).to_json() == {"masked_heads": {"1": [0, 3]}}


@given(st.sets(st.sampled_from([(layer, head) for layer in range(3) for head in range(SHAPE[layer])])))
def test_json_text_reads_back_as_the_same_mask(heads: set[tuple[int, int]]) -> None:
    before = mask(*heads)
    after = HeadMask.from_json(json.loads(json.dumps(before.to_json())), SHAPE, "mask.json")
    assert (after, after.digest) == (before, before.digest)


def test_the_digest_is_pinned_for_ever() -> None:
    # printf '2,4,3;0.1,2.2' | sha256sum
    assert mask((2, 2), (0, 1)).digest == "dbf8ba74baa54c1cac5f92f1bc874b6b29e29fb0827b1b9f3bf58a6f3e8a3a6e"


def test_the_digest_tells_models_and_masks_apart() -> None:
    masks = [mask(), mask((0, 1)), mask((1, 0)), HeadMask((2, 4, 4), frozenset({(0, 1)}))]
    assert len({each.digest for each in masks}) == len(masks)


def test_a_mask_survives_pickling() -> None:
    assert pickle.loads(pickle.dumps(mask((1, 2)))) == mask((1, 2))


@pytest.mark.parametrize("head", [(3, 0), (0, 2), (-1, 0), (0, -1)])
def test_a_head_that_is_not_the_models_is_refused(head: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="got \\("):
        mask(head)


@pytest.mark.parametrize("shape", [(), (2, 0)])
def test_a_model_without_layers_or_heads_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least one head, got"):
        HeadMask(shape, frozenset())


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"masked_heads": {"3": [0]}}, 'm.json: expected layers "0" to "2", as text, got \'3\''),
        ({"masked_heads": {"-1": [0]}}, "got '-1'"),
        ({"masked_heads": {"01": [0]}}, "got '01'"),
        ({"masked_heads": {"٣": [0]}}, "got '٣'"),
        ({"masked_heads": {1: [0]}}, "got 1"),
        ({"masked_heads": {"": [0]}}, "got ''"),
        ({"masked_heads": {"1": [4]}}, "m.json: layer 1 has heads 0 to 3, as whole numbers, got 4"),
        ({"masked_heads": {"0": [-1]}}, "layer 0 has heads 0 to 1, as whole numbers, got -1"),
        ({"masked_heads": {"0": [True]}}, "got True"),
        ({"masked_heads": {"0": [1.0]}}, "got 1.0"),
        ({"masked_heads": {"0": ["1"]}}, "got '1'"),
        ({"masked_heads": {"0": [None]}}, "got None"),
        ({"masked_heads": {"0": 1}}, "expected a list of heads for layer 0, got 1"),
        ({"masked_heads": {"0": "01"}}, "expected a list of heads for layer 0, got '01'"),
        ({"masked_heads": [[0, 1]]}, 'expected {"masked_heads"'),
        ({"heads": {}}, 'expected {"masked_heads"'),
        ([], 'expected {"masked_heads"'),
        (None, "got None"),
    ],
)
def test_json_of_another_shape_or_range_is_refused_with_the_range(data: Any, reason: str) -> None:
    with pytest.raises(UsageError) as error:
        HeadMask.from_json(data, SHAPE, "m.json")
    assert reason in str(error.value)


def test_further_keys_such_as_a_digest_are_left_alone() -> None:
    assert HeadMask.from_json({"masked_heads": {"0": [1]}, "digest": "x"}, SHAPE, "m.json") == mask((0, 1))


def test_masks_cost_no_torch_until_one_becomes_a_tensor() -> None:
    code = (
        "import sys, headprobe.masks as m; m.MaskSpec('each:head').expand((2, 2), 'm'); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
