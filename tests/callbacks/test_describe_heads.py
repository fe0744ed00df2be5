"""The command that describes every head: its files, TensorBoard, and how callbacks are added and dropped."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from headprobe.callbacks.describing import HeadAttention, HeadSpectrum
from headprobe.data.datamodule import ImageNetDataModule
from headprobe.describe.base import Role
from headprobe.metrics.attention.statistics import RATIOS, STATISTICS
from headprobe.module import HeadProbe
from tests.cli_runs import QUICK, Ended, command, only_message

CALLBACKS = ("HeadAttention", "HeadSimilarity", "HeadSpectrum")
HEADS = 24  # of digits_vit: 6 layers of 4

pytestmark = pytest.mark.usefixtures("no_arguments")


def config(folder: Path, *callbacks: str | dict[str, object], model: str = "digits_vit") -> Path:
    listed = [{"class_path": entry} if isinstance(entry, str) else entry for entry in callbacks]
    file = folder / "describe.yaml"
    file.write_text(yaml.safe_dump({"model": {"name": model}, "trainer": {"callbacks": listed}}))
    return file


def rows(ended: Ended, name: str) -> list[dict[str, str]]:
    with (ended.directory() / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """One run of everything, under a single mask."""
    folder = tmp_path_factory.mktemp("both")
    ended = command(folder, "test", "--config", str(config(folder, *CALLBACKS)), "--mask-spec", "layer:3", *QUICK)
    assert ended.code == 0, ended.err
    return ended


def test_heads_csv_has_a_row_for_each_head_of_the_baseline_and_the_masked_model(both: Ended) -> None:
    found = rows(both, "heads.csv")
    heads = [(row["mask"], int(row["layer"]), int(row["head"])) for row in found]
    assert heads == [(mask, layer, head) for mask in ("none", "layer:3") for layer in range(6) for head in range(4)]
    for name in (*STATISTICS, *RATIOS):
        assert {name, f"{name}_se"} <= found[0].keys()
    assert {row["images"] for row in found} == {"40"}


def test_a_statistic_that_is_not_defined_is_an_empty_cell_with_its_reason_in_run_json(both: Ended) -> None:
    assert {row["register_mass"] for row in rows(both, "heads.csv")} == {""}
    record = json.loads((both.directory() / "run.json").read_text())
    ((reason, layers),) = record["undefined"]["register_mass"].items()
    assert "no registers" in reason
    assert layers == list(range(6))


def test_differences_are_masked_minus_baseline_and_nothing_before_the_mask(both: Ended) -> None:
    table, change = rows(both, "heads.csv"), rows(both, "heads_change.csv")
    assert [row["mask"] for row in change] == ["layer:3"] * HEADS
    for name in ("attention_distance_px", "entropy_nats", "svcca_mean", "high_frequency"):
        for baseline, masked, difference in zip(table[:HEADS], table[HEADS:], change, strict=True):
            if masked[name]:
                expected = float(masked[name]) - float(baseline[name])
                assert float(difference[name]) == pytest.approx(expected, abs=1e-9)
            if int(difference["layer"]) < 3:
                assert float(difference[name]) == 0


def test_a_masked_head_has_no_similarity_and_no_spectrum_in_the_masked_model(both: Ended) -> None:
    silent = [row for row in rows(both, "heads.csv") if row["mask"] == "layer:3" and row["layer"] == "3"]
    assert {(row["rank"], row["svcca_mean"], row["high_frequency"], row["output_norm_ratio"]) for row in silent} == {
        ("0", "", "", "0.0")
    }


def test_similarity_npz_says_what_it_was_made_of_and_is_1_on_its_diagonal(both: Ended) -> None:
    with np.load(both.directory() / "similarity.npz", allow_pickle=False) as found:
        assert found["svcca"].shape == (HEADS, HEADS)
        np.testing.assert_allclose(found["svcca"].diagonal(), 1)
        same_layer = found["layer"][:, None] == found["layer"][None]
        assert np.array_equal(np.isfinite(found["svcca"]), same_layer)
        assert (int(found["images"]), set(found["samples"].tolist())) == (40, {40 * 65})
        assert (str(found["sampling"]), str(found["scope"]), str(found["mask"])) == ("tokens", "within", "layer:3")
        assert np.isnan(found["masked_svcca"][found["layer"] == 3]).all()
        inside = found["svcca"][same_layer]
        assert (found["svcca_low"][same_layer] <= inside).all()
        assert (found["svcca_high"][same_layer] >= inside).all()
        assert (found["svcca_floor"][same_layer] < 1).all()


def test_spectrum_csv_has_both_models_and_the_stream(both: Ended) -> None:
    found = rows(both, "spectrum.csv")
    assert {row["mask"] for row in found} == {"none", "layer:3"}
    assert {row["series"] for row in found} == {"head", "contribution", "stream_before", "stream_after"}
    assert {row["head"] for row in found if row["series"].startswith("stream")} == {"-1"}
    assert (both.directory() / "spectrum_change.csv").exists()


def test_offset_maps_sum_to_1(both: Ended) -> None:
    with np.load(both.directory() / "offset_maps.npz", allow_pickle=False) as found:
        assert {f"layer_{n:03d}" for n in range(6)} <= set(found.files)
        np.testing.assert_allclose(found["layer_002"].sum(axis=(1, 2)), 1, atol=1e-5)


def test_each_kind_of_picture_is_drawn(both: Ended) -> None:
    drawn = {file.stem for file in (both.directory() / "figures").glob("*.png")}
    assert {
        "attention_distance_px_by_layer",
        "entropy_nats_by_layer",
        "svcca_by_layer_baseline",
        "svcca_clustered_baseline",
        "svcca_change",
        "spectrum_head_baseline",
        "spectrum_stream_masked",
        "offset_maps_baseline",
    } <= drawn


def test_tensorboard_has_curves_over_layers_histograms_and_images(both: Ended) -> None:
    events = EventAccumulator(str(both.directory()), size_guidance={"images": 0, "scalars": 0}).Reload()
    curve = events.Scalars("attention_distance_px/head_02")
    table = [row for row in rows(both, "heads.csv") if row["mask"] == "none" and row["head"] == "2"]
    assert [point.step for point in curve] == list(range(6))
    expected = [float(row["attention_distance_px"]) for row in table]
    np.testing.assert_allclose([point.value for point in curve], expected, rtol=1e-6)
    tags = events.Tags()
    assert {"attention_distance_px_masked/head_02", "attention_distance_px_change/head_02"} <= set(tags["scalars"])
    assert "entropy_nats" in tags["histograms"]
    assert "attention_distance_px/by_layer" in tags["images"]


def test_the_table_says_what_a_sample_is(both: Ended) -> None:
    assert "Similarity: 2,600 samples (all tokens of 40 images)" in both.out
    assert re.search(r"^ +5 +4 +\d", both.out, re.MULTILINE)


def test_a_run_without_these_callbacks_writes_none_of_their_files(tmp_path: Path) -> None:
    ended = command(tmp_path, "test", *QUICK)
    assert ended.code == 0, ended.err
    names = {path.name for path in ended.directory().iterdir()}
    assert names.isdisjoint({"heads.csv", "heads_change.csv", "similarity.npz", "spectrum.csv", "offset_maps.npz"})
    assert "undefined" not in json.loads((ended.directory() / "run.json").read_text())


@pytest.mark.parametrize(
    ("callback", "column", "file"),
    [
        ("HeadAttention", "entropy_nats", "offset_maps.npz"),
        ("HeadSimilarity", "svcca_mean", "similarity.npz"),
        ("HeadSpectrum", "high_frequency", "spectrum.csv"),
    ],
)
def test_a_callback_is_added_by_its_short_name_and_writes_only_its_own(
    tmp_path: Path, callback: str, column: str, file: str
) -> None:
    ended = command(tmp_path, "test", "--trainer.callbacks", callback, *QUICK)
    assert ended.code == 0, ended.err
    assert column in rows(ended, "heads.csv")[0]
    written = {"offset_maps.npz", "similarity.npz", "spectrum.csv"} & {p.name for p in ended.directory().iterdir()}
    assert written == {file}


def test_options_of_a_callback_reach_it_from_yaml(tmp_path: Path) -> None:
    chosen = {"scope": "all", "sampling": "mean", "measures": ["cka_unbiased"], "noise_floor": False}
    file = config(tmp_path, {"class_path": "HeadSimilarity", "init_args": chosen})
    ended = command(tmp_path, "test", "--config", str(file), *QUICK)
    assert ended.code == 0, ended.err
    with np.load(ended.directory() / "similarity.npz", allow_pickle=False) as found:
        assert np.isfinite(found["cka_unbiased"]).all()
        assert "svcca" not in found
        assert "cka_unbiased_floor" not in found
    assert "40 samples (token means of 40 images)" in ended.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "every"}, "scope must be one of within, all, pairs, got 'every'"),
        ({"measures": ["svca"]}, "measures must be some of svcca, cca"),
        ({"variance": 2}, "variance must be above 0"),
        ({"scope": "all", "groups": 4}, "only for the scope 'within'"),
        ({"sampling": "class"}, "no class token"),
        ({"scope": "all"}, "sampling mean"),
    ],
)
def test_what_cannot_be_is_one_message_and_exit_code_2(
    tmp_path: Path, options: dict[str, object], message: str
) -> None:
    file = config(tmp_path, {"class_path": "HeadSimilarity", "init_args": options}, model="digits_swin")
    ended = command(tmp_path, "test", "--config", str(file), *QUICK)
    assert ended.code == 2
    assert message in only_message(ended)


def test_the_same_callback_twice_is_refused(tmp_path: Path) -> None:
    file = config(tmp_path, "HeadSpectrum", "HeadSpectrum")
    ended = command(tmp_path, "test", "--config", str(file), *QUICK)
    assert ended.code == 2
    assert "may hold one HeadSpectrum" in only_message(ended)


def test_statistics_are_part_of_the_key_of_a_run(tmp_path: Path) -> None:
    keys = set()
    for version, words in enumerate(
        ((), ("--trainer.callbacks", "HeadSpectrum"), ("--trainer.callbacks", "HeadAttention"))
    ):
        ended = command(tmp_path, "test", *words, *QUICK)
        keys.add(json.loads((ended.directory(version) / "run.json").read_text())["key"])
    assert len(keys) == 3


def test_heads_can_be_masked_in_the_order_of_a_column_of_heads_csv(both: Ended, tmp_path: Path) -> None:
    spec = f"grow:{both.directory()}:entropy_nats:least:1-2"
    ended = command(tmp_path, "test", "--mask-spec", spec, *QUICK)
    assert ended.code == 0, ended.err
    assert [row["heads_masked"] for row in ended.rows()] == ["0", "1", "2"]


def test_a_misspelt_callback_is_answered_with_the_right_names(tmp_path: Path) -> None:
    ended = command(tmp_path, "test", "--trainer.callbacks", "HeadAttentio", *QUICK)
    assert ended.code == 2
    assert "HeadAttention, HeadSimilarity, HeadSpectrum" in ended.err


def test_heads_of_layers_that_were_not_compared_have_empty_cells_and_a_reason(tmp_path: Path) -> None:
    file = config(tmp_path, {"class_path": "HeadSimilarity", "init_args": {"scope": "pairs", "pairs": [[0, 1]]}})
    ended = command(tmp_path, "test", "--config", str(file), *QUICK)
    assert ended.code == 0, ended.err
    found = rows(ended, "heads.csv")
    assert list(found[0])[:4] == ["mask", "layer", "head", "images"]
    assert {(row["rank"] != "", row["svcca_mean"] != "") for row in found[:8]} == {(True, True)}
    assert {(row["rank"], row["svcca_mean"]) for row in found[8:]} == {("", "")}
    undefined = json.loads((ended.directory() / "run.json").read_text())["undefined"]
    assert undefined["svcca_mean"] == {"the layer is in none of the pairs": [2, 3, 4, 5]}


def test_a_grid_without_other_frequencies_has_no_highest_one(tmp_path: Path) -> None:
    words = ("--model.name", "swin_tiny_patch4_window7_224", "--model.pretrained", "false", "--model.num_classes", "10")
    size = "{img_size: 32, window_size: 2, embed_dim: 24, depths: [1, 1, 1], num_heads: [2, 2, 2]}"
    ended = command(tmp_path, "test", *words, "--model.options", size, "--trainer.callbacks", "HeadSpectrum", *QUICK)
    assert ended.code == 0, ended.err
    empty = {row["layer"] for row in rows(ended, "heads.csv") if not row["high_frequency"]}
    undefined = json.loads((ended.directory() / "run.json").read_text())["undefined"]
    ((_, layers),) = undefined["high_frequency"].items()
    assert empty == {str(layer) for layer in layers} == {"2"}


def test_a_run_that_broke_leaves_no_statistic_behind(tmp_path: Path) -> None:
    class Broken(lightning.Callback):
        def on_test_batch_start(self, *args: object, **kwargs: object) -> None:
            raise RuntimeError("the culprit")

    def test(probe: HeadProbe, *callbacks: lightning.Callback) -> None:
        options: Any = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = lightning.Trainer(default_root_dir=tmp_path, accelerator="cpu", callbacks=[*callbacks], **options)
        trainer.test(probe, ImageNetDataModule(max_images=8, num_workers=0), verbose=False)

    probe, attention = HeadProbe(), HeadAttention(offset_maps=False)
    with pytest.raises(RuntimeError, match="the culprit"):
        test(probe, HeadSpectrum(), HeadAttention(), Broken())
    test(probe, attention)
    assert attention.statistic.columns()[Role.BASELINE]["images"].tolist() == [8] * HEADS


def documented(heading: str) -> list[str]:
    """The names in the first cells of the tables below a heading of docs/describe_heads.md."""
    text = (Path(__file__).resolve().parents[2] / "docs/describe_heads.md").read_text(encoding="utf-8")
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    return [name for cell in cells for name in re.findall(r"`([\w<>]+)`", cell)]


def test_every_column_of_heads_csv_is_documented_in_its_order(both: Ended) -> None:
    written = [name for name in rows(both, "heads.csv")[0] if not name.endswith("_se")]
    assert documented("heads.csv") == written


def test_every_column_of_spectrum_csv_is_documented_in_its_order(both: Ended) -> None:
    assert documented("spectrum.csv") == list(rows(both, "spectrum.csv")[0])


def test_every_array_of_similarity_npz_is_documented(both: Ended) -> None:
    with np.load(both.directory() / "similarity.npz", allow_pickle=False) as found:
        plain = {name for name in found.files if not name.startswith(("masked_", "change_"))}
    named = set(documented("similarity.npz"))
    measures = [name for name in plain if f"{name}_floor" in plain]
    expected = {name.replace("<measure>", measure) for name in named for measure in measures}
    about_heads = {"layer", "head"}  # in the text
    assert expected - {"precision", "noise_floor", "pairs", "measures"} == plain - about_heads
