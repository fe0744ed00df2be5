"""Runs whose classifier is not the model's own: what is said, kept, shared, refused and left out."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

import headprobe
from headprobe.errors import RunError, UsageError
from tests.cli_runs import Ended, command, only_message
from tests.forked import DIGITS

LOCAL = ("--data.num_workers", "0", "--trainer.accelerator", "cpu")
FEW = ("--data.max_images", "100", *LOCAL)
MEANS = ("--model.classifier", "class-mean")


def record(ended: Ended, version: int = 0) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((ended.directory(version) / "run.json").read_text())
    return content


def stores(folder: Path) -> int:
    return len(list(folder.glob("lightning_logs/units/*/store.json")))


def images_of(folder: Path, labels: list[int], column: Any = None) -> Path:
    """Write bundled images of these digits, in one row group, with what `column` makes of their labels."""
    table = pq.read_table(DIGITS / "test.parquet").to_pylist()
    left: dict[int, list[Any]] = {digit: [one for one in table if one["label"] == digit] for digit in range(10)}
    images = [left[label].pop(0)["image"] for label in labels]
    found = pa.table({"image": images, "label": labels if column is None else [column(label) for label in labels]})
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(found, folder / "validation-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    ended = command(tmp_path_factory.mktemp("fitted"), "test", "--mask-spec", "layer:0", *MEANS, *FEW)
    assert ended.code == 0, ended.err
    return ended


def test_what_classifies_is_said_before_the_table_and_kept(fitted: Ended) -> None:
    assert "classifier: class-mean, temperature 0.07: of " in fitted.out
    assert "a class-mean classifier is not a linear probe" in fitted.out
    assert "own classifier: of 10 classes, set aside" in fitted.out
    kept = record(fitted)["classifier"]
    assert kept["kind"] == "class-mean"
    assert kept["note"] == "a class-mean classifier is not a linear probe"
    assert kept["images"] == record(fitted)["calibration_images"]
    assert kept["images_of_a_class"][0] >= 1
    assert record(fitted)["model"]["classifier"]["digest"] == kept["digest"]
    about = json.loads((fitted.directory() / "calibration.json").read_text())
    assert about["classifier"]["digest"] == kept["digest"]


def test_another_temperature_shares_the_means_and_is_judged_anew(fitted: Ended) -> None:
    before = stores(fitted.folder)
    other = ("--model.classifier", "class-mean:0.5")
    ended = command(fitted.folder, "test", "--mask-spec", "layer:0", *other, *FEW)
    assert ended.code == 0, ended.err
    assert stores(fitted.folder) == before + 1
    version = len(list(fitted.folder.glob("lightning_logs/version_*"))) - 1
    one, two = fitted.rows(), ended.rows(version)
    assert [row["top1_count"] for row in one] == [row["top1_count"] for row in two]
    assert one[0]["nll"] != two[0]["nll"]
    assert record(ended, version)["units_resumed"] == 0


def test_constants_and_scores_are_fitted_beside_the_classifier(fitted: Ended) -> None:
    kinds = ("--mask-spec", "layer:0", "--ablation", "zero,mean,optimal", "--score-heads")
    ended = command(fitted.folder, "test", *kinds, *MEANS, *FEW)
    assert ended.code == 0, ended.err
    version = len(list(fitted.folder.glob("lightning_logs/version_*"))) - 1
    zero = [float(row["nll"]) for row in ended.rows(version) if row["ablation"] in ("none", "zero")]
    assert zero == pytest.approx([float(row["nll"]) for row in fitted.rows()], abs=1e-6)
    reason = record(ended, version)["undefined"]["direct_logit"]
    assert list(reason) == ["its logits come from class-mean:0.07"]
    again = command(fitted.folder, "test", *kinds, *MEANS, *FEW, "--calibration-file", str(ended.directory(version)))
    assert again.code == 0, again.err
    assert [row["nll"] for row in again.rows(version + 1)] == [row["nll"] for row in ended.rows(version)]


def test_a_classifier_of_an_earlier_run_is_used_again(fitted: Ended, tmp_path: Path) -> None:
    file = str(fitted.directory() / "calibration.safetensors")
    ended = command(tmp_path, "test", "--mask-spec", "layer:0", *MEANS, *FEW, "--calibration-file", file)
    assert ended.code == 0, ended.err
    assert [row["nll"] for row in ended.rows()] == [row["nll"] for row in fitted.rows()]
    assert stores(tmp_path) == 1  # nothing was fitted
    assert "fitted by an earlier run" in ended.out
    (kept, earlier) = (record(ended)["classifier"], record(fitted)["classifier"])
    assert kept == earlier
    assert (ended.directory() / "calibration.safetensors").read_bytes() == Path(file).read_bytes()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--model.classifier", "class-mean:0.5"), "give --model.classifier class-mean:0.07, or fit anew"),
        (("--model.classifier", "knn"), "give --model.classifier class-mean:0.07, or fit anew"),
        ((), "leave it out"),
        (("--ablation", "mean", *MEANS), "constants of every head"),
        (("--model.name", "digits_swin", *MEANS), "fitted on another model"),
    ],
    ids=["temperature", "kind", "own", "constants", "model"],
)
def test_a_calibration_that_does_not_hold_what_is_wanted_is_refused(
    fitted: Ended, tmp_path: Path, words: tuple[str, ...], reason: str
) -> None:
    given = ("--calibration-file", str(fitted.directory()))
    ended = command(tmp_path, "test", "--mask-spec", "layer:0", *words, *FEW, *given)
    assert ended.code == 2
    assert reason in only_message(ended)


def test_the_models_own_classifier_as_a_file_gives_its_own_numbers(tmp_path: Path) -> None:
    state = load_file(DIGITS / "digits_vit.safetensors")
    head = tmp_path / "head.safetensors"
    save_file({"weight": state["head.weight"], "bias": state["head.bias"]}, head)
    own = command(tmp_path / ".", "test", "--mask-spec", "each:layer", *FEW)
    file = command(tmp_path / ".", "test", "--mask-spec", "each:layer", *FEW, "--model.classifier", str(head))
    assert (own.code, file.code) == (0, 0), file.err
    for one, other in zip(own.rows(0), file.rows(1), strict=True):
        assert one["top1_count"] == other["top1_count"]
        assert float(one["nll"]) == pytest.approx(float(other["nll"]), abs=1e-6)
    assert "head.safetensors, 10 classes of 64 channels; logits are weight @ feature + bias" in file.out
    save_file({"weight": state["head.weight"] * 2, "bias": state["head.bias"]}, head)  # the same path, another head
    changed = command(tmp_path / ".", "test", "--mask-spec", "each:layer", *FEW, "--model.classifier", str(head))
    assert record(changed, 2)["units_resumed"] == 0
    assert changed.rows(2)[0]["nll"] != file.rows(1)[0]["nll"]


def test_a_head_of_another_width_is_refused_with_both(tmp_path: Path) -> None:
    save_file({"weight": torch.randn(10, 512)}, tmp_path / "head.safetensors")
    ended = command(tmp_path, "test", "--model.classifier", "head.safetensors", *FEW)
    assert ended.code == 2
    assert "for features of 512 numbers, and the feature of model 'digits_vit' has 64" in only_message(ended)


def test_names_in_a_heads_file_say_which_class_is_which(tmp_path: Path) -> None:
    state = load_file(DIGITS / "digits_vit.safetensors")
    order = torch.tensor([9, 3, 0, 1, 2, 4, 5, 6, 7, 8])
    tensors = {"weight": state["head.weight"][order].clone(), "bias": state["head.bias"][order].clone()}
    names = [f"digit {number}" for number in order.tolist()]
    save_file(tensors, tmp_path / "head.safetensors", metadata={"classes": json.dumps(names)})
    images_of(tmp_path / "set", [*range(10)] * 3, lambda label: f"Digit_{label}")
    given = ("--data.path", "set", "--model.classifier", "head.safetensors", *LOCAL)
    ended = command(tmp_path, "test", *given)
    assert ended.code == 0, ended.err
    assert int(ended.rows()[0]["top1_count"]) >= 29


def test_the_bundled_model_is_built_without_its_classifier(tmp_path: Path, fitted: Ended) -> None:
    ended = command(tmp_path, "test", "--mask-spec", "layer:0", "--model.num_classes", "0", *MEANS, *FEW)
    assert ended.code == 0, ended.err
    assert "classifier left out: head, of 10 classes" in ended.out
    for one, other in zip(ended.rows(), fitted.rows(), strict=True):
        assert float(one["nll"]) == pytest.approx(float(other["nll"]), abs=1e-6)


def test_weights_without_a_classifier_are_fitted_too(tmp_path: Path, fitted: Ended) -> None:
    state = load_file(DIGITS / "digits_vit.safetensors")
    save_file({name: own for name, own in state.items() if not name.startswith("head.")}, tmp_path / "w.safetensors")
    given = ("--model.weights", "w.safetensors", "--model.num_classes", "0")
    ended = command(tmp_path, "test", "--mask-spec", "layer:0", *given, *MEANS, *FEW)
    assert ended.code == 0, ended.err
    assert "own classifier" not in ended.out
    for one, other in zip(ended.rows(), fitted.rows(), strict=True):
        assert float(one["nll"]) == pytest.approx(float(other["nll"]), abs=1e-6)
    refused = command(tmp_path, "test", *given[:2], *MEANS, *FEW)
    assert "--model.num_classes 0" in only_message(refused)


# -- classes and labels ------------------------------------------------------------------------------------------------


def test_plain_numbers_need_the_number_of_classes(tmp_path: Path) -> None:
    images_of(tmp_path / "set", [*range(10)] * 8)
    given = ("test", "--data.path", "set", "--mask-spec", "layer:0", *MEANS, *LOCAL)
    ended = command(tmp_path, *given)
    assert ended.code == 2
    assert "give --model.num_classes N" in only_message(ended)
    ended = command(tmp_path, *given, "--model.num_classes", "10")
    assert ended.code == 0, ended.err
    assert record(ended)["classifier"]["classes"] == 10


def test_a_class_map_joins_classes(tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(json.dumps({str(digit): digit % 2 for digit in range(10)}))
    ended = command(tmp_path, "test", *MEANS, *FEW, "--data.class_map", "map.json", "--model.per_class", "true")
    assert ended.code == 0, ended.err
    kept = record(ended)["classifier"]
    assert kept["class_names"] == ["0 / 2 / 4 / 6 / 8", "1 / 3 / 5 / 7 / 9"]
    assert kept["images_of_a_class"][1] > 15


RARE = [0, 1, 2, 3] * 10 + [7]
"""Labels of 41 images; the one of class 7 falls into the half that is judged."""


def rare(folder: Path) -> tuple[str, ...]:
    """Write these images with texts as labels, and return the options that name them and their class map."""
    images_of(folder / "set", RARE, lambda label: f"kind {label}")
    kinds = {f"kind {label}": place for place, label in enumerate(sorted(set(RARE)))}
    (folder / "map.json").write_text(json.dumps(kinds))
    return ("--data.path", "set", "--data.class_map", "map.json")


def test_a_class_without_calibration_image_is_refused_by_its_name(tmp_path: Path) -> None:
    images_of(tmp_path / "set", RARE, lambda label: f"kind {label}")
    (tmp_path / "map.json").write_text(
        json.dumps({f"kind {label}": place for place, label in enumerate([0, 1, 2, 3, 7])})
    )
    given = ("test", "--data.path", "set", "--data.class_map", "map.json", "--mask-spec", "layer:0", *LOCAL)
    for classifier in ("class-mean", "knn"):
        ended = command(tmp_path, *given, "--model.classifier", classifier)
        assert ended.code == 2, ended.out
        message = only_message(ended)
        assert message.startswith("1 of 5 classes have no calibration image")
        assert message.endswith("got class kind 7\n")
        wrong = command(tmp_path, *given, "--model.classifier", classifier, "--data.on_bad_image", "wrong")
        assert wrong.code == 2


def test_its_images_may_be_left_out_counted_and_named(tmp_path: Path) -> None:
    images_of(tmp_path / "set", RARE, lambda label: f"kind {label}")
    (tmp_path / "map.json").write_text(
        json.dumps({f"kind {label}": place for place, label in enumerate([0, 1, 2, 3, 7])})
    )
    given = ("test", "--data.path", "set", "--data.class_map", "map.json", "--mask-spec", "layer:0", *LOCAL)
    ended = command(tmp_path, *given, *MEANS, "--data.on_bad_image", "skip", "--data.restrict_classes", "false")
    assert ended.code == 0, ended.err
    assert "classes without calibration images: kind 7: 1 of 5 classes, left out of the choice" in ended.out
    bad = (ended.directory() / "bad_images.csv").read_text().splitlines()
    assert len(bad) == 2
    assert "class kind 7 has no calibration image" in bad[1]
    found = record(ended)
    assert int(ended.rows()[0]["images"]) + found["calibration_images"] + 1 == len(RARE)
    assert found["classifier"]["classes_without_images"] == [4]
    assert found["data"]["chosen_among"] == 4
    given_again = (*given, *MEANS, "--data.restrict_classes", "false", "--calibration-file", str(ended.directory()))
    refused = command(tmp_path, *given_again)
    assert "have no calibration image" in only_message(refused)
    again = command(tmp_path, *given_again, "--data.on_bad_image", "skip")
    assert again.code == 0, again.err
    assert again.rows(1)[0]["nll"] == ended.rows()[0]["nll"]


def test_python_users_who_give_such_a_classifier_have_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ("test", *rare(tmp_path), *LOCAL, "--data.on_bad_image", "skip")
    ended = command(tmp_path, *given, *MEANS)
    assert ended.code == 0, ended.err
    monkeypatch.chdir(tmp_path)
    for policy in ("skip", "error"):
        probe = headprobe.HeadProbe(classifier="class-mean")
        probe.choose_masks("none")
        probe.use_calibration(ended.directory())
        data = headprobe.ImageNetDataModule("set", class_map="map.json", num_workers=0, on_bad_image=policy)
        trainer = headprobe.ProbeTrainer(accelerator="cpu", logger=False, enable_progress_bar=False)
        if policy == "error":
            with pytest.raises(UsageError, match="have no calibration image"):
                trainer.test(probe, datamodule=data, verbose=False)
            continue
        trainer.test(probe, datamodule=data, verbose=False)
        assert probe.scores is not None
        assert float(probe.scores.nll[0]) == pytest.approx(float(ended.rows()[0]["nll"]), abs=1e-9)


def test_one_image_of_each_class_has_no_mean_in_the_other_half_and_is_refused(tmp_path: Path) -> None:
    images_of(tmp_path / "set", [*range(10)], lambda label: f"kind {label}")
    (tmp_path / "map.json").write_text(json.dumps([f"kind {label}" for label in range(10)]))
    given = ("test", "--data.path", "set", "--data.class_map", "map.json", *MEANS, *LOCAL)
    for policy in ("error", "skip"):
        ended = command(tmp_path, *given, "--data.on_bad_image", policy)
        if policy == "error":
            assert ended.code == 2
            assert "have no calibration image" in only_message(ended)
        else:  # those that are judged have none: nothing is left
            assert ended.code != 0


def test_one_calibration_image_a_class_is_a_mean_and_said(tmp_path: Path) -> None:
    images_of(tmp_path / "set", [*range(10)], lambda label: f"kind {label}")
    (tmp_path / "map.json").write_text(json.dumps([f"kind {label}" for label in range(10)]))
    given = ("test", "--data.path", "set", "--data.class_map", "map.json", *MEANS, *LOCAL)
    ended = command(tmp_path, *given, "--data.calibration", "same")
    assert ended.code == 0, ended.err
    assert "of 10 images, 1 of each class" in ended.out
    assert "which flatters" in ended.out
    assert ended.rows()[0]["top1_count"] == "10"


def test_duplicate_classes_are_named(tmp_path: Path) -> None:
    for name, label in (("a", 0), ("b", 1), ("copy of a", 0)):
        images = [one for one in pq.read_table(DIGITS / "test.parquet").to_pylist() if one["label"] == label][:12]
        folder = tmp_path / "set" / "val" / name
        folder.mkdir(parents=True)
        for number, image in enumerate(images):
            (folder / f"{number}.png").write_bytes(image["image"]["bytes"])
    given = ("test", "--data.path", "set", *LOCAL, "--data.calibration", "same")
    ended = command(tmp_path, *given, *MEANS)
    assert ended.code == 0, ended.err
    assert "1 pair of classes with equal means, between which rounding decides: a, copy of a" in ended.out
    ended = command(tmp_path, *given, "--model.classifier", "knn")
    assert ended.code == 0, ended.err
    assert "12 images of the bank equal one of another class" in ended.out


def test_a_class_that_the_map_skips_is_refused(tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(json.dumps({str(digit): 1 + digit % 2 for digit in range(10)}))
    ended = command(tmp_path, "test", *MEANS, *FEW, "--data.class_map", "map.json")
    assert ended.code == 2
    assert "count them without gaps, from 0" in only_message(ended)


# -- in Python, and before a run ---------------------------------------------------------------------------------------


def test_python_users_have_it_too(tmp_path: Path, fitted: Ended, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    probe = headprobe.HeadProbe(classifier="class-mean")
    probe.choose_masks("layer:0")
    data = headprobe.ImageNetDataModule(max_images=100, num_workers=0)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    headprobe.ProbeTrainer(**options).test(probe, datamodule=data, verbose=False)
    assert probe.num_classes == 10
    assert probe.scores is not None
    assert float(probe.scores.nll[0]) == pytest.approx(float(fitted.rows()[0]["nll"]), abs=1e-6)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        logits = probe.masked_logits(images)
    assert logits.shape == (2, 3, 10)
    assert np.isfinite(logits.numpy()).all()


def test_before_it_is_fitted_there_are_no_logits() -> None:
    probe = headprobe.HeadProbe(classifier="knn")
    probe.choose_masks("layer:0")
    probe.plan_passes(2)
    with pytest.raises(RunError, match=r"fitted by ProbeTrainer\.test"), torch.inference_mode():
        probe.masked_logits(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_a_choice_that_is_none_is_refused_before_the_model_is_built() -> None:
    with pytest.raises(UsageError, match="did you mean class-mean"):
        headprobe.HeadProbe("no such model", classifier="class-means")


def test_a_bank_that_is_too_large_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headprobe.metrics.feature_bank.MOST_BYTES", 30 * 64 * 4)
    ended = command(tmp_path, "test", "--model.classifier", "knn", *FEW)
    assert ended.code == 2
    assert "give --data.calibration_images 30 or fewer" in only_message(ended)
    ended = command(tmp_path, "test", "--model.classifier", "knn", *FEW, "--data.calibration_images", "30")
    assert ended.code == 0, ended.err
    shutil.rmtree(tmp_path / "lightning_logs")
