"""Classes that are counted otherwise where a classifier is fitted than where it judges: the worst way to be wrong."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.classifiers.drawn import normed
from tests.classifiers.test_on_digits import without_classifier
from tests.classifiers.test_runs import FEW, LOCAL, MEANS, images_of, record
from tests.cli_runs import Ended, command, only_message
from tests.forked import DIGITS

SPLIT = ("--data.path", "set", "--data.split", "test", "--data.calibration", "split:train", "--mask-spec", "layer:3")


def folders(path: Path, split: str, digits: Sequence[int], each: int) -> None:
    """Write so many images of some digits as class folders; each split has folders of its own."""
    table = pq.read_table(DIGITS / f"{split}.parquet").to_pylist()
    for digit in digits:
        folder = path / split / f"digit_{digit}"
        folder.mkdir(parents=True)
        for number, row in enumerate([row for row in table if row["label"] == digit][:each]):
            (folder / f"{number}.png").write_bytes(row["image"]["bytes"])


def by_hand(path: Path, digits: Sequence[int]) -> int:
    """Return how many of the judged images of these digits class means find, with plain timm."""
    import timm
    from PIL import Image

    model = without_classifier()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)

    def features(split: str, digit: int) -> Any:
        files = sorted((path / split / f"digit_{digit}").iterdir())
        with torch.inference_mode():
            batch = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
            return normed(model(batch).double().numpy())

    means = normed(np.stack([features("train", digit).mean(axis=0) for digit in digits]))
    return sum(
        int(((features("test", digit) @ means.T).argmax(axis=1) == place).sum()) for place, digit in enumerate(digits)
    )


@pytest.mark.parametrize("restrict", ["true", "false"])
def test_a_split_with_more_classes_fits_each_class_by_its_name(tmp_path: Path, restrict: str) -> None:
    # the first folder of `train` is another class than the first of `test`
    folders(tmp_path / "set", "test", [3, 4, 5, 6], 12)
    folders(tmp_path / "set", "train", range(8), 15)
    ended = command(tmp_path, "test", *SPLIT, *MEANS, *LOCAL, "--data.restrict_classes", restrict)
    assert ended.code == 0, ended.err
    assert int(ended.rows()[0]["top1_count"]) == by_hand(tmp_path / "set", [3, 4, 5, 6])
    assert int(ended.rows()[0]["top1_count"]) > 40
    assert record(ended)["classifier"]["images_of_a_class"] == [15, 15]
    assert record(ended)["classifier"]["images_without_a_label"] == 60
    assert "digit_0, digit_1, digit_2, digit_7: 4 classes of the split that calibrates" in ended.out


def test_a_class_that_the_fitting_split_lacks_is_refused_by_its_own_name(tmp_path: Path) -> None:
    folders(tmp_path / "set", "test", [0, 1, 2, 3], 6)
    folders(tmp_path / "set", "train", [1, 2, 3], 6)
    ended = command(tmp_path, "test", *SPLIT, *MEANS, *LOCAL)
    assert ended.code == 2, ended.out
    message = only_message(ended)
    assert message.startswith("1 of 4 classes have no calibration image")
    assert message.endswith("got class digit_0\n")


def test_a_class_map_joins_classes_that_only_the_fitting_split_has(tmp_path: Path) -> None:
    folders(tmp_path / "set", "test", [3, 4], 6)
    folders(tmp_path / "set", "train", [1, 3, 4], 6)
    (tmp_path / "map.json").write_text(json.dumps({"digit_1": 0, "digit_3": 0, "digit_4": 1}))
    ended = command(tmp_path, "test", *SPLIT, *MEANS, *LOCAL, "--data.class_map", "map.json")
    assert ended.code == 0, ended.err
    assert record(ended)["classifier"]["images_of_a_class"] == [6, 12]


def joined(tmp_path: Path, name: str, of_digit: dict[str, int], *words: str) -> Ended:
    (tmp_path / name).write_text(json.dumps(of_digit))
    return command(tmp_path, "test", "--mask-spec", "layer:0", *MEANS, "--data.class_map", name, *words)


ODD = {str(digit): digit % 2 for digit in range(10)}
LARGE = {str(digit): int(digit > 4) for digit in range(10)}


def test_a_given_classifier_is_refused_under_a_map_that_joins_otherwise(tmp_path: Path) -> None:
    fitted = joined(tmp_path, "odd.json", ODD, *FEW)
    assert fitted.code == 0, fitted.err
    given = ("--calibration-file", str(fitted.directory()))
    other = joined(tmp_path, "large.json", LARGE, *FEW, *given)
    assert other.code == 2, other.out
    message = only_message(other)
    assert "fitted with another --data.class_map" in message
    assert "got large.json, in which 1 is class 0 where it was class 1" in message
    again = joined(tmp_path, "same.json", ODD, *FEW, *given)
    assert again.code == 0, again.err
    assert again.rows(1)[0]["nll"] == fitted.rows()[0]["nll"]


def test_plain_numbers_that_a_map_joins_otherwise_are_refused_too(tmp_path: Path) -> None:
    images_of(tmp_path / "set", [*range(10)] * 6)
    data = ("--data.path", "set", *LOCAL)
    fitted = joined(tmp_path, "odd.json", ODD, *data)
    assert fitted.code == 0, fitted.err
    other = joined(tmp_path, "large.json", LARGE, *data, "--calibration-file", str(fitted.directory()))
    assert other.code == 2, other.out
    assert "on these files with another --data.class_map" in only_message(other)


# -- heads of a file ---------------------------------------------------------------------------------------------------


def test_a_head_that_names_no_classes_is_said_to_go_by_the_order_of_the_data(tmp_path: Path) -> None:
    state = load_file(DIGITS / "digits_vit.safetensors")
    tensors = {"weight": state["head.weight"], "bias": state["head.bias"]}
    save_file(tensors, tmp_path / "plain.safetensors")
    save_file(tensors, tmp_path / "named.safetensors", metadata={"classes": json.dumps([*map(str, range(10))])})
    said = "it names no classes"
    plain = command(tmp_path, "test", "--model.classifier", "plain.safetensors", *FEW)
    assert said in plain.out
    named = command(tmp_path, "test", "--model.classifier", "named.safetensors", *FEW)
    assert "named.safetensors, 10 classes" in named.out
    assert said not in named.out


def test_names_in_a_head_and_a_class_map_must_not_contradict_each_other(tmp_path: Path) -> None:
    state = load_file(DIGITS / "digits_vit.safetensors")
    order = torch.tensor([1, 0, *range(2, 10)])
    tensors = {"weight": state["head.weight"][order].clone(), "bias": state["head.bias"][order].clone()}
    save_file(tensors, tmp_path / "head.safetensors", metadata={"classes": json.dumps([*map(str, order.tolist())])})
    given = ("test", "--model.classifier", "head.safetensors", *FEW)
    ended = command(tmp_path, *given, "--data.class_map", "identity")
    assert ended.code == 2, ended.out
    assert "got identity, in which 0 is class 0 where it was class 1" in only_message(ended)
    (tmp_path / "map.json").write_text(json.dumps({str(name): place for place, name in enumerate(order.tolist())}))
    agreed, none = command(tmp_path, *given, "--data.class_map", "map.json"), command(tmp_path, *given)
    assert (agreed.code, none.code) == (0, 0), agreed.err
    assert agreed.rows()[0]["top1_count"] == none.rows(1)[0]["top1_count"] == "98"


def test_a_head_that_is_transposed_is_refused_by_its_width_and_not_by_its_classes(tmp_path: Path) -> None:
    state = load_file(DIGITS / "digits_vit.safetensors")
    save_file({"weight": state["head.weight"].T.contiguous()}, tmp_path / "head.safetensors")
    ended = command(tmp_path, "test", "--model.classifier", "head.safetensors", *FEW)
    assert ended.code == 2
    message = only_message(ended)
    assert "features of 10 numbers" in message
    assert "transpose it" in message


def test_text_embeddings_of_zeros_have_no_direction_and_are_refused(tmp_path: Path) -> None:
    weight = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    weight[7] = 0
    save_file({"weight": weight, "logit_scale": torch.tensor(2.0)}, tmp_path / "head.safetensors")
    ended = command(tmp_path, "test", "--model.classifier", "head.safetensors", *FEW)
    assert ended.code == 2, ended.out  # each logit would be NaN, and each image wrong
    assert "zeros in row 7" in only_message(ended)
    save_file({"weight": weight}, tmp_path / "head.safetensors")
    assert command(tmp_path, "test", "--model.classifier", "head.safetensors", *FEW).code == 0
