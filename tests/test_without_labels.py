"""Runs on images without labels, and the feature columns of any run: plain timm and numpy are the oracle."""

import copy
import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

import headprobe
from headprobe.data.datamodule import ImageNetDataModule
from headprobe.metrics.features import FeatureSums
from headprobe.module import HeadProbe
from headprobe.report.page.build import build
from headprobe.report.page.notices import notices
from headprobe.run.load import load_files
from tests import forked
from tests.cli_runs import QUICK, Ended, command, only_message
from tests.families import REPRESENTATIVES

DIGITS = Path(headprobe.__file__).with_name("data") / "digits" / "test.parquet"
FEATURES = [f"feature_{name}{end}" for name in ("cosine", "distance") for end in ("", "_low", "_high")]
NONE = ("--model.classifier", "none")
MANY = "[each:layer,each:head,grow:random:0-2,each:index,one-per-layer:0-2]"


def images(count: int) -> list[bytes]:
    return [cell.as_py()["bytes"] for cell in pq.read_table(DIGITS)["image"][:count]]


def flat_folder(folder: Path, count: int = 40) -> Path:
    folder.mkdir(parents=True)
    for number, content in enumerate(images(count)):
        (folder / f"{number:03d}.png").write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return flat_folder(tmp_path_factory.mktemp("images") / "flat")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, flat: Path) -> Ended:
    """A run of many masks under two ablations, with scores and records."""
    folder = tmp_path_factory.mktemp("many")
    words = ("--mask-spec", MANY, "--ablation", "zero,mean", "--score-heads", "--records")
    ended = command(folder, "test", *QUICK, *NONE, "--data.path", str(flat), *words)
    assert ended.code == 0, ended.err
    return ended


def oracle(probe: HeadProbe, pixels: Tensor) -> tuple[Any, Any]:
    """Cosine and relative distance of each layer's mask and image, by plain timm: a projection without weights."""

    def feature(model: Any) -> Any:
        with torch.inference_mode():
            found = model.forward_head(model.forward_features(probe.normalised(pixels)), pre_logits=True)
        return found.double().numpy()

    plain = feature(probe.backbone)
    found = []
    for block in range(len(probe.layout.layers)):
        masked: Any = copy.deepcopy(probe.backbone)
        masked.blocks[block].attn.proj.weight.data.zero_()
        found.append(feature(masked))
    sizes = np.linalg.norm(plain, axis=-1)
    cosine = np.stack([(one * plain).sum(axis=-1) / np.linalg.norm(one, axis=-1) / sizes for one in found])
    return cosine, np.stack([np.linalg.norm(one - plain, axis=-1) / sizes for one in found])


def pixels(probe: HeadProbe, count: int) -> Tensor:
    data = ImageNetDataModule(max_images=count, num_workers=0)
    data.bind(probe.data_config, 10)
    return torch.cat([batch.images for batch in data.stream()])


@pytest.mark.parametrize("classifier", [(), NONE])
def test_feature_columns_are_those_of_plain_timm_for_all_masks_of_each_layer(
    tmp_path: Path, classifier: tuple[str, ...]
) -> None:
    ended = command(tmp_path, "test", *QUICK, *classifier, "--mask-spec", "each:layer")
    probe = HeadProbe()
    cosine, distance = oracle(probe, pixels(probe, 40))
    rows = ended.rows()
    assert [rows[0]["feature_cosine"], rows[0]["feature_distance"], rows[0]["feature_cosine_low"]] == ["1.0", "0.0", ""]
    for layer, row in enumerate(rows[1:]):
        assert row["mask"] == f"layer:{layer}"
        assert float(row["feature_cosine"]) == pytest.approx(cosine[layer].mean(), abs=1e-6)
        assert float(row["feature_distance"]) == pytest.approx(distance[layer].mean(), abs=1e-6)
        assert float(row["feature_distance_low"]) < distance[layer].mean() < float(row["feature_distance_high"])


@pytest.mark.parametrize(
    ("broken", "rows"), [(0.0, "baseline, layer:0, layer:1, layer:2, layer:3"), (np.nan, "layer:2")]
)
def test_images_whose_feature_says_nothing_are_counted_once_where_it_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: float, rows: str
) -> None:
    real, batches = FeatureSums.update, 0

    def update(self: FeatureSums, features: Tensor, groups: Tensor) -> None:
        features = features.clone()
        nonlocal batches
        batches += 1
        features[0 if broken == 0 else 3, :2] = broken
        real(self, features, groups)

    monkeypatch.setattr(FeatureSums, "update", update)
    ended = command(tmp_path, "test", *QUICK, "--mask-spec", "each:layer")
    assert ended.code == 0, ended.err
    (said,) = (line for line in ended.out.splitlines() if "left out" in line)
    assert f"under {rows}: at most {2 * batches} images left out of their means" in said
    assert {row["nonfinite"] for row in ended.rows()} == {"0"}  # of logits
    notice = next(text for text in notices(load_files(ended.directory())) if text.startswith("Features without"))
    assert f"(at most {2 * batches} images): " in notice
    assert notice.endswith("layer:2." if broken else "baseline, layer:0, layer:1, layer:2, layer:3 and 2 others.")


def test_the_same_images_with_and_without_labels_give_the_same_features(tmp_path: Path) -> None:
    words = ("test", *QUICK, "--mask-spec", "each:layer")
    labelled, free = command(tmp_path / "", *words), command(tmp_path, *words, *NONE)
    for one, other in zip(labelled.rows(0), free.rows(1), strict=True):
        assert [one[name] for name in FEATURES] == [other[name] for name in FEATURES]
    assert set(free.rows(1)[0]) == {
        *("mask", "ablation", "draw", "calibration", "test_family", "heads_masked", "images", "nonfinite"),
        *FEATURES,
    }
    record = json.loads((free.directory(1) / "run.json").read_text())
    assert record["model"]["classifier"] == "none"
    assert "no label is read" in record["decisions"]["classifier"]
    assert "classifier: none" in free.out


def class_folders(folder: Path) -> Path:
    for number, content in enumerate(images(6)):
        place = folder / ("cats" if number % 2 else "dogs")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.png").write_bytes(content)
    return folder


def parquet(folder: Path, labels: list[int] | None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    cells = {"image": [{"bytes": content, "path": None} for content in images(6)]}
    pq.write_table(pa.table(cells if labels is None else {**cells, "label": labels}), folder / "test.parquet")
    return folder


def listed(folder: Path) -> Path:
    flat_folder(folder, 6)
    (folder / "metadata.csv").write_text("file_name\n" + "".join(f"{number:03d}.png\n" for number in range(6)))
    return folder


def split_folder(folder: Path) -> Path:
    flat_folder(folder / "val", 6)
    flat_folder(folder / "train", 3)
    return folder


@pytest.mark.parametrize("make", [class_folders, listed, split_folder, lambda one: flat_folder(one, 6)])
def test_folders_of_images_need_no_classes(tmp_path: Path, make: Any) -> None:
    place = make(tmp_path / "images")
    ended = command(tmp_path, "test", *QUICK, *NONE, "--mask-spec", "layer:1", "--data.path", str(place))
    assert ended.code == 0, ended.err
    assert [row["images"] for row in ended.rows()] == ["6", "6"]


@pytest.mark.parametrize("labels", [None, [-1] * 6, [0, 1, 2, 3, 4, 5]])
def test_parquet_needs_no_labels(tmp_path: Path, labels: list[int] | None) -> None:
    place = parquet(tmp_path / "data", labels)
    ended = command(tmp_path, "test", *QUICK, *NONE, "--mask-spec", "layer:1", "--data.path", str(place))
    assert ended.code == 0, ended.err
    assert [row["images"] for row in ended.rows()] == ["6", "6"]


@pytest.mark.parametrize(
    "make", [lambda one: flat_folder(one, 6), lambda one: parquet(one, None), lambda one: parquet(one, [-1] * 6)]
)
def test_the_refusal_of_unlabelled_data_names_the_option(tmp_path: Path, make: Any) -> None:
    ended = command(tmp_path, "test", *QUICK, "--mask-spec", "layer:1", "--data.path", str(make(tmp_path / "images")))
    assert ended.code == 2
    assert "--model.classifier none" in only_message(ended)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--ablation", "optimal"), "the ablation optimal lowers the loss"),
        (("--mask-spec", "grow:calibration:gradient_abs:least"), "the score gradient_abs needs a classifier"),
        (("--model.per_class", "true"), "--model.per_class counts right answers"),
        (("--data.on_bad_image", "wrong"), "has no answers: choose skip or error"),
        (("--data.class_map", "identity"), "leave one of the two out"),
        (("--model.classifier", "nothing"), "--model.classifier must be class-mean, knn, FILE.safetensors or none"),
    ],
)
def test_what_needs_labels_is_refused_with_the_remedy(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    ended = command(tmp_path, "test", *QUICK, *NONE, *words)
    assert ended.code == 2
    assert message in only_message(ended)


SMALL_DINO = ("--model.name", "vit_small_patch14_dinov2.lvd142m", "--model.pretrained", "false")
DINO_SIZE = ("--model.options", "{img_size: 28, depth: 2, init_values: 1.0}")


def test_a_model_without_a_classifier_is_judged_by_its_output(tmp_path: Path, flat: Path) -> None:
    words = ("test", *QUICK, *SMALL_DINO, *DINO_SIZE, "--mask-spec", "each:layer", "--data.path", str(flat))
    refused = only_message(command(tmp_path, *words))
    for choice in ("class-mean", "knn", "none", "FILE.safetensors"):
        assert choice in refused
    ended = command(tmp_path, *words, *NONE)
    assert ended.code == 0, ended.err
    assert all(float(row["feature_distance"]) > 0 for row in ended.rows()[1:])
    record = json.loads((ended.directory() / "run.json").read_text())
    assert (record["model"]["features"], record["model"]["num_classes"]) == (384, 0)


def test_the_projection_of_a_clip_tower_is_its_feature_and_said(tmp_path: Path, flat: Path) -> None:
    words: tuple[str, ...] = ("--model.name", "vit_base_patch32_clip_224.openai", "--model.pretrained", "false")
    words += ("--model.options", "{img_size: 32, depth: 2, embed_dim: 48, num_heads: 4}", "--data.path", str(flat))
    refused = only_message(command(tmp_path, "test", *QUICK, *words))
    assert "a projection into the 512 numbers of the space of texts" in refused
    ended = command(tmp_path, "test", *QUICK, *words, *NONE, "--mask-spec", "each:layer")
    record = json.loads((ended.directory() / "run.json").read_text())
    assert record["model"]["features"] == 512
    assert "512 numbers" in record["decisions"]["embedding"]


def test_a_model_whose_feature_cannot_be_read_has_empty_columns_with_the_reason(tmp_path: Path) -> None:
    options = json.dumps(REPRESENTATIVES["resnet_clip"].options)
    words: tuple[str, ...] = (
        "--model.name",
        "resnet50_clip",
        "--model.pretrained",
        "false",
        "--model.num_classes",
        "10",
    )
    words += ("--model.options", options, "--data.max_images", "4")
    ended = command(tmp_path, "test", *QUICK, *words, "--mask-spec", "each:layer")
    assert ended.code == 0, ended.err
    assert {row[name] for row in ended.rows() for name in FEATURES} == {""}
    undefined = json.loads((ended.directory() / "run.json").read_text())["undefined"]
    assert list(undefined["feature_cosine"]) == ["what enters its classifier is not timm's pooled feature"]
    refused = command(tmp_path, "test", *QUICK, *words, *NONE)
    assert "cannot be read" in only_message(refused)


# -- everything that is made of such a run --


def test_every_table_that_features_allow_is_there_and_none_speaks_of_accuracy(many: Ended) -> None:
    tables = {path.name for path in many.directory().glob("*.csv")}
    assert tables >= {"masks.csv", "curves.csv", "orders.csv", "index_null.csv", "ablations.csv", "importance.csv"}
    run = load_files(many.directory())
    assert not run.labelled
    for name in tables:
        columns = set(run.table(name) or {})
        assert not columns & {"top1", "top5", "nll", "drop_pp", "nll_rise", "mcnemar_p", "area", "removable_1pp"}, name
    assert {str(one) for one in (run.table("index_null.csv") or {})["quantity"]} == {"feature_distance"}
    scores = run.table("scores.csv") or {}
    assert np.isnan(scores["gradient_abs"]).all()
    assert np.isfinite(scores["variance_after_projection"]).all()
    assert "nothing classifies" in next(iter(run.record["undefined"]["gradient_abs"]))


def test_curves_and_areas_follow_from_masks_csv(many: Ended) -> None:
    run = load_files(many.directory())
    table = run.table("curves.csv") or {}
    seeds = [row for row in run.masks[1:] if row["ablation"] == "zero" and str(row["mask"]).startswith("random:6:")]
    chosen = (table["order"] == "random") & (table["heads_removed"] == 6) & (table["ablation"] == "zero")
    assert table["feature_cosine"][chosen][0] == pytest.approx(np.mean([row["feature_cosine"] for row in seeds]))
    own = (table["order"] == "random_seed_0") & (table["ablation"] == "zero")
    heights = np.append(1.0, table["feature_cosine"][own])
    removed = np.append(0, table["heads_removed"][own])
    orders = run.table("orders.csv") or {}
    area = orders["feature_area"][(orders["order"] == "random_seed_0") & (orders["ablation"] == "zero")][0]
    assert area == pytest.approx(np.trapezoid(heights, removed) / removed[-1], abs=1e-9)


def drawn(folder: Path) -> Iterator[tuple[str, Any]]:
    for file in sorted((folder / "figures").glob("*.png")):
        yield file.name, np.asarray(Image.open(file).convert("L"))


def test_figures_are_of_features_and_none_is_empty(many: Ended) -> None:
    names = dict(drawn(many.directory()))
    assert {"feature_distance_by_layer.png", "feature_distance_heads.png", "curves_heads_removed.png"} <= names.keys()
    assert not [name for name in names if name.startswith(("drop_pp", "nll_rise"))]
    for name, pixels in names.items():
        assert pixels.std() > 5, name


def test_page_and_frames_read_such_a_run(many: Ended) -> None:
    page = build([load_files(many.directory())])
    assert "No label was read." in page
    assert "top-1" not in page.split('<script type="application/json"')[0].split("<style")[0]
    run = headprobe.load_run(many.directory())
    assert "features are compared" in run._repr_html_()
    for draw in (run.plot.drops, run.plot.heads_map, run.plot.curves, run.plot.importance):
        figure, _ = draw()
        assert figure.axes
    assert "decided" not in command(many.folder, "status", str(many.directory())).out


def test_records_have_features_and_no_label(many: Ended) -> None:
    table = pq.read_table(many.directory() / "records" / "unit-00000.parquet").to_pandas()
    rows = {(row["mask"], row["ablation"], int(row["draw"])): row for row in many.rows()}
    for name in ("label", "prediction", "margin", "nll"):
        assert table[name].isna().all()
    for key, own in table.groupby(["mask", "ablation", "draw"], observed=True):
        assert own["feature_distance"].mean() == pytest.approx(float(rows[key]["feature_distance"]), abs=1e-6)


def test_records_of_a_labelled_run_have_features_too(tmp_path: Path) -> None:
    ended = command(tmp_path, "test", *QUICK, "--mask-spec", "each:layer", "--records")
    folder = ended.directory() / "records"
    table = pa.concat_tables([pq.read_table(file) for file in sorted(folder.glob("*.parquet"))]).to_pandas()
    for row in ended.rows()[1:]:
        own = table[table["mask"] == row["mask"]]
        assert own["feature_cosine"].mean() == pytest.approx(float(row["feature_cosine"]), abs=1e-6)


def test_a_dry_run_says_what_it_would_do(tmp_path: Path, flat: Path) -> None:
    words = ("--mask-spec", "each:layer", "--ablation", "zero,mean", "--data.path", str(flat), "--dry-run")
    ended = command(tmp_path, "test", *QUICK, *NONE, *words)
    assert ended.code == 0, ended.err
    assert "no classifier" in ended.out
    assert "labels are not read" in ended.out
    assert "top-1" not in ended.out


def test_a_dry_run_plans_no_backward_pass_where_no_loss_has_a_gradient(tmp_path: Path, flat: Path) -> None:
    words = ("--score-heads", "--data.path", str(flat), "--dry-run")
    ended = command(tmp_path, "test", *QUICK, *NONE, *words)
    assert ended.code == 0, ended.err
    (fitting,) = (line for line in ended.out.splitlines() if line.startswith("fitting: "))
    assert fitting.startswith("fitting: scores of heads on ")
    assert "in one forward pass of the unmasked model" in fitting


def test_examples_of_unlabelled_images_have_no_prediction(tmp_path: Path, flat: Path) -> None:
    words = ("--mask-spec", "layer:1", "--data.path", str(flat), "--trainer.callbacks", "HeadAttention")
    ended = command(tmp_path, "test", *QUICK, *NONE, *words)
    assert ended.code == 0, ended.err
    assert (ended.directory() / "heads.csv").is_file()


def test_a_finished_run_is_added_up_again_with_the_same_features(tmp_path: Path, flat: Path) -> None:
    words = ("test", *QUICK, *NONE, "--mask-spec", "each:layer", "--data.path", str(flat))
    first, again = command(tmp_path, *words), command(tmp_path, *words)
    assert "scored before" in again.out + again.err
    assert first.rows(0) == again.rows(1)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[str, ...], Ended]:
    """A command that takes long enough to be killed in either stage, and its run in one piece."""
    folder = tmp_path_factory.mktemp("long")
    place = forked.digits(folder / "set", 480, 40)
    data = ("--data.path", str(place), "--data.num_workers", "0", "--data.batch_size", "2")
    masks = ("--mask-spec", "each:layer", "--ablation", "zero,mean", "--score-heads")
    words = ("test", *NONE, "--trainer.accelerator", "cpu", *data, *masks)
    whole = forked.run(folder / "whole", *words)
    assert whole.code == 0, whole.err
    return words, whole


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["fit", "test"])
def test_two_processes_that_are_killed_go_on_as_one_to_the_same_bits(
    tmp_path: Path, long: tuple[tuple[str, ...], Ended], stage: str
) -> None:
    words, whole = long
    ended, judged = forked.resumed_after_a_kill(tmp_path / "killed", {"fit": 1, "test": 2}[stage], *words)
    for name in ("masks.csv", "groups.npz", "scores.csv", "calibration.safetensors"):
        assert (ended.directory(judged) / name).read_bytes() == (whole.directory() / name).read_bytes(), name


def test_two_processes_give_the_features_of_one(tmp_path: Path) -> None:
    flat_folder(tmp_path / "images", 300)  # three units
    words = (
        "test",
        "--data.num_workers",
        "0",
        *NONE,
        "--mask-spec",
        "each:layer",
        "--data.path",
        str(tmp_path / "images"),
    )
    one = forked.run(tmp_path / "one", *words)
    two = forked.run(tmp_path / "two", *words, processes=2)
    assert (one.code, two.code) == (0, 0), two.err
    assert one.rows() == two.rows()


def test_an_old_run_without_features_loads_and_has_its_page(tmp_path: Path) -> None:
    ended = command(tmp_path, "test", *QUICK, "--mask-spec", "[each:head,grow:random:0-1]")
    assert ended.code == 0, ended.err
    directory = ended.directory()
    with (directory / "masks.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    keep = [place for place, name in enumerate(rows[0]) if not name.startswith("feature_")]
    with (directory / "masks.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([row[place] for place in keep] for row in rows)
    record = json.loads((directory / "run.json").read_text())
    del record["results"]
    (directory / "run.json").write_text(json.dumps(record))
    arrays = dict(np.load(directory / "groups.npz"))
    buffer = io.BytesIO()
    np.savez(buffer, **{name: values for name, values in arrays.items() if not name.startswith("feature_")})
    (directory / "groups.npz").write_bytes(buffer.getvalue())
    for name in ("curves.csv", "orders.csv"):
        (directory / name).unlink()
    run = load_files(directory)
    assert run.labelled
    assert build([run])
    assert command(tmp_path, "report", str(directory)).code == 0
