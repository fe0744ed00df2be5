import json
from pathlib import Path

import pytest

from headprobe.masks import HeadMask, MaskSpec, MaskSpecError

SHAPE = (2, 1, 3)


def write(folder: Path, text: str) -> Path:
    path = folder / "mask.json"
    path.write_text(text, "utf-8")
    return path


def refuse(path: Path) -> MaskSpecError:
    with pytest.raises(MaskSpecError) as error:
        MaskSpec(f"layer:1+file:{path}").expand(SHAPE, "tiny")
    assert error.value.column == len("layer:1+file:")
    return error.value


def test_a_mask_that_was_written_is_read(tmp_path: Path) -> None:
    mask = HeadMask(SHAPE, frozenset({(0, 1), (2, 0)}))
    path = write(tmp_path, json.dumps(mask.to_json()))
    (named,) = MaskSpec(f"file:{path}").expand(SHAPE, "tiny")
    assert (named.name, named.mask, named.curve, named.step) == (f"file:{path}", mask, "heads_masked", 2)


def test_a_saved_mask_joins_with_other_clauses(tmp_path: Path) -> None:
    path = write(tmp_path, '{"masked_heads": {"0": [1]}}')
    (named,) = MaskSpec(f"keep:file:{path}+layer:2").expand(SHAPE, "tiny")
    assert named.mask.masked == {(0, 0), (1, 0)}


def test_a_product_with_a_saved_mask_has_a_curve_that_is_a_safe_tag(tmp_path: Path) -> None:
    path = write(tmp_path, '{"masked_heads": {"0": [1]}}')
    curve = MaskSpec(f"file:{path}+each:layer").expand(SHAPE, "tiny")[0].curve
    assert curve.endswith("_by_layer")
    assert curve.replace("_", "").isalnum()


@pytest.mark.parametrize("baseline", ["", '"none": {"masked_heads": {}}, '])
def test_a_runs_masks_json_with_one_mask_is_read(tmp_path: Path, baseline: str) -> None:
    path = write(tmp_path, "{" + baseline + '"head:0.1": {"masked_heads": {"0": [1]}, "digest": "x"}}')
    (named,) = MaskSpec(f"file:{path}").expand(SHAPE, "tiny")
    assert named.mask.masked == {(0, 1)}


def test_a_runs_masks_json_with_several_masks_lists_their_names(tmp_path: Path) -> None:
    masks = {f"head:2.{head}": {"masked_heads": {"2": [head]}} for head in range(3)}
    reason = refuse(write(tmp_path, json.dumps(masks))).reason
    assert "holds 3 masks: expected exactly one; write its name instead, got head:2.0, head:2.1, head:2.2" in reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "expected a mask as JSON"),
        ("masked", "which is not: Expecting value: line 1 column 1"),
        ("9" * 5000, "expected a mask as JSON"),
        ("[" * 200_000, "expected a mask as JSON"),
        ("[]", 'expected {"masked_heads": {"LAYER": [HEAD, ...]}}'),
        ("{}", 'expected {"masked_heads": {"LAYER": [HEAD, ...]}}'),
        (
            '{"masked_heads": {"0": [0]}, "masked_heads": {}}',
            "a key stands twice in the mask's JSON, got 'masked_heads'",
        ),
        ('{"masked_heads": {"0": [0], "0": [1]}}', "a key stands twice in the mask's JSON, got '0'"),
        ('{"masked_heads": {"0": [2]}}', "for tiny: layer 0 has heads 0 to 1, as whole numbers, got 2"),
        ('{"masked_heads": {"3": [0]}}', 'for tiny: expected layers "0" to "2", as text, got \'3\''),
        ('{"masked_heads": {"0": [NaN]}}', "got nan"),
    ],
)
def test_a_file_without_one_mask_of_the_model_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    assert reason in refuse(write(tmp_path, text)).reason


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mask.json"
    path.write_bytes(b"\x80\x81")
    assert "expected a mask as JSON" in refuse(path).reason


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path: Path) -> None:
    assert (
        f"cannot read the mask: No such file or directory; give a file, got {tmp_path}/no"
        in refuse(tmp_path / "no").reason
    )
    assert "cannot read the mask: Is a directory" in refuse(tmp_path).reason
