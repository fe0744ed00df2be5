"""Runs that score heads and mask them in the order of a score: what they write, to the bit, and what is flagged."""

import csv
import json
from pathlib import Path
from typing import Any

import lightning
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file

import headprobe
from headprobe.calibration import optimal
from headprobe.errors import UsageError
from headprobe.masks.tables import SCORES
from headprobe.module import HeadProbe
from tests.callbacks.test_resume import broken_off
from tests.cli_runs import Ended, command, only_message
from tests.forked import DIGITS, run

pytestmark = pytest.mark.usefixtures("no_pictures")

FEW = ("--data.max_images", "60", "--data.num_workers", "0", "--trainer.accelerator", "cpu")
SPEC = ("--mask-spec", "grow:calibration:gradient_abs:most:1-24/6", "--ablation", "zero,linear")


def scores_of(ended: Ended, number: int = 0) -> list[dict[str, str]]:
    with (ended.directory(number) / "scores.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


def masked_of(ended: Ended, number: int = 0) -> dict[str, set[tuple[int, int]]]:
    masks = json.loads((ended.directory(number) / "masks.json").read_text())
    return {
        name: {(int(layer), head) for layer, heads in mask["masked_heads"].items() for head in heads}
        for name, mask in masks.items()
        if name != "schema"
    }


def record(ended: Ended, number: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ended.directory(number) / "run.json").read_text())
    return found


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    ended = command(tmp_path_factory.mktemp("grown"), "test", *SPEC, *FEW)
    assert ended.code == 0, ended.err
    return ended


def test_masks_grow_in_the_order_of_the_run_s_own_scores(grown: Ended) -> None:
    rows = scores_of(grown)
    assert list(rows[0]) == ["layer", "head", "images", *SCORES]
    assert len(rows) == 24
    order = sorted(rows, key=lambda row: -float(row["gradient_abs"]))
    heads = [(int(row["layer"]), int(row["head"])) for row in order]
    masked = masked_of(grown)
    for count in (1, 7, 13, 19):
        assert masked[f"grow:calibration:gradient_abs:most:{count}"] == set(heads[:count])


def test_scores_come_from_the_images_that_calibrate_and_are_kept_with_the_constants(grown: Ended) -> None:
    about = json.loads((grown.directory(0) / "calibration.json").read_text())
    rows = scores_of(grown)
    assert {row["images"] for row in rows} == {str(about["images"])}
    assert about["images"] + record(grown)["data"]["images"] == 60
    kept = load_file(grown.directory(0) / "calibration.safetensors")
    for row in rows:
        for name in SCORES:
            value = kept[f"layers.{row['layer']}.scores.{name}"][int(row["head"])]
            assert float(row[name]) == pytest.approx(float(value), rel=1e-9)


def test_the_bundled_swin_says_why_scores_are_empty(tmp_path: Path) -> None:
    words = ("--model.name", "digits_swin", "--score-heads", "--mask-spec", "none", *FEW)
    ended = command(tmp_path, "test", *words)
    assert ended.code == 0, ended.err
    assert {row["direct_logit"] for row in scores_of(ended)} == {""}
    assert "not a plain vision transformer" in str(record(ended)["undefined"]["direct_logit"])
    refused = command(tmp_path, "test", *words[:2], "--mask-spec", "grow:calibration:direct_logit", *FEW)
    assert refused.code == 2
    assert "the heads of digits_swin have no such score" in only_message(refused)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("grow:calibration:gradient", "expected a score of the run's own calibration: gradient_abs,"),
        ("grow:calibration:gradient_abs:first", "expected least or most"),
        ("grow:calibration", "or calibration:SCORE: write grow:random:0-4"),
    ],
)
def test_what_is_no_order_is_one_message_before_anything_runs(tmp_path: Path, spec: str, reason: str) -> None:
    ended = command(tmp_path, "test", "--mask-spec", spec, *FEW)
    assert ended.code == 2
    assert reason in only_message(ended)
    assert not (tmp_path / "lightning_logs").exists()


def test_scores_of_an_earlier_calibration_order_the_same_masks(grown: Ended) -> None:
    again = command(grown.folder, "test", *SPEC, *FEW, "--calibration-file", "lightning_logs/version_0")
    assert again.code == 0, again.err
    last = max(int(path.name.split("_")[1]) for path in grown.folder.glob("lightning_logs/version_*"))
    assert masked_of(again, last) == masked_of(grown)
    masks = json.loads((again.directory(last) / "masks.json").read_text())
    for name, digest, _, _ in record(again, last)["variants"]:
        assert masks[name]["digest"] == digest


def test_optimal_constants_are_sought_for_the_heads_that_the_scores_choose(
    tmp_path: Path, grown: Ended, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimal, "MOST_ROUNDS", 1)
    words = ("--mask-spec", "grow:calibration:gradient_abs:most:1", "--ablation", "optimal")
    ended = command(tmp_path, "test", *words, *FEW)
    assert ended.code == 0, ended.err
    about = json.loads((ended.directory(0) / "calibration.json").read_text())
    heads = {(one["layer"], one["head"]) for one in about["optimal"]["heads"]}
    assert heads == masked_of(grown)["grow:calibration:gradient_abs:most:1"]


def test_a_plain_trainer_scores_no_masks_of_heads_that_nobody_chose(tmp_path: Path) -> None:
    probe = HeadProbe()
    probe.choose_masks("grow:calibration:gradient_abs:least:3")
    data = headprobe.ImageNetDataModule(max_images=20, num_workers=0)
    options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "default_root_dir": tmp_path}
    trainer = lightning.Trainer(enable_progress_bar=False, enable_checkpointing=False, **options)
    with pytest.raises(UsageError, match="masks in the order of a score need a calibration"):
        trainer.test(probe, datamodule=data, verbose=False)


def test_a_calibration_without_scores_orders_nothing(tmp_path: Path) -> None:
    assert command(tmp_path, "test", "--mask-spec", "layer:3", "--ablation", "linear", *FEW).code == 0
    ended = command(tmp_path, "test", *SPEC, *FEW, "--calibration-file", "lightning_logs/version_0")
    assert ended.code == 2
    assert "holds no scores of heads" in only_message(ended)


def test_an_order_by_images_that_are_judged_is_said_to_flatter(grown: Ended) -> None:
    """Scores of the half that calibrates do not flatter the other half; rises that were measured on it do."""
    source = Path("lightning_logs/version_0")
    apart = command(grown.folder, "test", "--mask-spec", f"grow:{source}:stable_rank:least:6", *FEW)
    assert apart.code == 0, apart.err
    assert "which flatters" in apart.out  # without --data.calibration half all images are judged
    half = ("--data.calibration", "half")
    apart = command(grown.folder, "test", "--mask-spec", f"grow:{source}:stable_rank:least:6", *half, *FEW)
    assert apart.code == 0, apart.err
    assert "which flatters" not in apart.out
    assert command(grown.folder, "test", "--mask-spec", "each:head", *half, *FEW).code == 0
    last = max(int(path.name.split("_")[1]) for path in grown.folder.glob("lightning_logs/version_*"))
    measured = f"grow:lightning_logs/version_{last}:nll_rise:least:6"
    flattering = command(grown.folder, "test", "--mask-spec", measured, *half, *FEW)
    assert flattering.code == 0, flattering.err
    assert "nll_rise of lightning_logs" in flattering.out
    assert "which flatters" in flattering.out


def test_the_masks_command_says_that_heads_are_known_later(tmp_path: Path) -> None:
    ended = command(tmp_path, "masks", "grow:calibration:stable_rank:least:3")
    assert ended.code == 0, ended.err
    assert "known once a run has calibrated" in ended.out
    assert "0.0" not in ended.out
    assert command(tmp_path, "masks", "grow:calibration:stable_rank", "--json").code == 2


def test_ablate_masks_the_heads_that_the_run_masked_and_none_without_scores(grown: Ended) -> None:
    probe = HeadProbe()
    spec, run = "grow:calibration:gradient_abs:most:7", grown.directory(0)
    seen: dict[int, list[int]] = {}

    def look(layer: int) -> Any:
        def hook(_: Any, args: tuple[Any, ...]) -> None:
            by_head = args[0].unflatten(-1, (4, -1)).abs().sum(dim=(0, 1, 3))
            seen[layer] = (by_head == 0).nonzero().flatten().tolist()

        return hook

    with headprobe.ablate(probe.backbone, spec, calibration=run), torch.no_grad():
        for layer in range(6):
            probe.backbone.get_submodule(f"blocks.{layer}.attn.proj").register_forward_pre_hook(look(layer))
        probe.backbone(torch.randn(2, *probe.data_config["input_size"]))
    assert {(layer, head) for layer, heads in seen.items() for head in heads} == masked_of(grown)[spec]
    for given in (None, "nowhere", 3):
        with pytest.raises(UsageError), headprobe.ablate(probe.backbone, spec, calibration=given):  # type: ignore[arg-type]
            pass


def test_a_dry_run_plans_the_scores_and_warns_of_no_trial(tmp_path: Path) -> None:
    ended = command(tmp_path, "test", *SPEC, *FEW, "--dry-run")
    assert ended.code == 0, ended.err
    assert "scores of heads on" in ended.out
    assert "forward and backward pass" in ended.out
    assert "few calibration images" not in ended.out
    assert not (tmp_path / "lightning_logs").exists()


# -- to the bit --------------------------------------------------------------------------------------------------------


def test_a_run_that_broke_off_in_either_stage_has_the_same_scores_masks_and_numbers(
    tmp_path: Path, grown: Ended
) -> None:
    broken_off(tmp_path, 2, "test", *SPEC, *FEW, stage="validation_step")
    broken_off(tmp_path, 7, "test", *SPEC, *FEW)  # the rest of the calibration, and some of what is judged
    ended = command(tmp_path, "test", *SPEC, *FEW)
    assert ended.code == 0, ended.err
    last = max(int(path.name.split("_")[1]) for path in tmp_path.glob("lightning_logs/version_*"))
    for name in ("scores.csv", "masks.csv", "masks.json", "calibration.safetensors"):
        assert (ended.directory(last) / name).read_bytes() == (grown.directory(0) / name).read_bytes(), name


@pytest.mark.slow
def test_two_processes_find_the_same_scores_to_the_bit(tmp_path: Path, grown: Ended) -> None:
    two = run(tmp_path, "test", *SPEC, *FEW, processes=2)
    assert two.code == 0, two.err
    for name in ("scores.csv", "masks.csv", "masks.json"):
        assert (two.directory(0) / name).read_bytes() == (grown.directory(0) / name).read_bytes(), name


# -- images without labels ---------------------------------------------------------------------------------------------


@pytest.fixture
def without_labels(tmp_path: Path) -> Path:
    """Digits whose split train has -1 for every label, as published test splits have."""
    for split in ("train", "test"):
        table = pq.read_table(DIGITS / f"{split}.parquet").slice(0, 40)
        if split == "train":
            place = table.column_names.index("label")
            kind = table.schema.field("label")
            table = table.set_column(place, kind, pa.array([-1] * len(table), kind.type))
        (tmp_path / "set").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "set" / f"{split}.parquet", row_group_size=10)
    return tmp_path


UNLABELLED = ("--data.path", "set", "--data.split", "test", "--data.calibration", "split:train", *FEW[2:])


def test_images_without_labels_fit_constants_and_give_the_scores_that_need_none(without_labels: Path) -> None:
    words = ("--mask-spec", "layer:3", "--ablation", "mean,linear,position", "--score-heads", *UNLABELLED)
    ended = command(without_labels, "test", *words)
    assert ended.code == 0, ended.err
    about = json.loads((ended.directory(0) / "calibration.json").read_text())
    assert (about["images"], about["images_labelled"], about["images_left_out"]) == (40, 0, 0)
    for row in scores_of(ended):
        empty = {name for name in SCORES if row[name] == ""}
        assert empty == {name for name in SCORES if name.startswith(("gradient", "taylor", "direct"))}
    assert "no calibration image has a label" in str(record(ended)["undefined"]["gradient_abs"])


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--mask-spec", "head:3.1", "--ablation", "optimal"), "none of them has a label"),
        (("--mask-spec", "grow:calibration:gradient_abs:least:3"), "have no such score"),
    ],
)
def test_what_needs_labels_is_refused_without_them(without_labels: Path, words: tuple[str, ...], reason: str) -> None:
    ended = command(without_labels, "test", *words, *UNLABELLED)
    assert ended.code == 2, ended.err
    assert reason in only_message(ended)


# -- scored anew after each tenth of the heads -------------------------------------------------------------------------

ANEW = (
    "--mask-spec",
    "grow:calibration:gradient_abs:most:rescored:1-7/2",
    "--ablation",
    "zero,linear",
    *("--data.max_images", "30", "--data.num_workers", "0", "--trainer.accelerator", "cpu"),
)
WRITTEN = ("scores.csv", "masks.csv", "masks.json", "calibration.json", "calibration.safetensors")


@pytest.fixture(scope="module")
def anew(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    ended = command(tmp_path_factory.mktemp("anew"), "test", *ANEW)
    assert ended.code == 0, ended.err
    return ended


def test_the_order_of_a_run_that_scores_anew_is_one_for_all_ablations_and_is_said(anew: Ended) -> None:
    (order,) = record(anew)["rescored"]["orders"]
    assert (order["score"], order["direction"], record(anew)["rescored"]["ablation"]) == (
        "gradient_abs",
        "most",
        "zero",
    )
    assert record(anew)["rescored"]["rounds"] == 2  # after 2 and after 5 of 24 heads
    heads = [tuple(head) for head in order["heads"]]
    masked = masked_of(anew)
    for count in (1, 3, 5, 7):
        assert masked[f"grow:calibration:gradient_abs:most:rescored:{count}"] == set(heads[:count])
    first = sorted(scores_of(anew), key=lambda row: -float(row["gradient_abs"]))[:2]
    assert heads[:2] == [(int(row["layer"]), int(row["head"])) for row in first]  # the whole model's scores
    assert "computed anew after each tenth of the heads, of the model without these by zero; one order" in anew.out
    with (anew.directory(0) / "orders.csv").open(newline="") as lines:
        assert {row["order"] for row in csv.DictReader(lines)} == {"grow_gradient_abs_most_rescored"}


def test_a_run_that_broke_off_in_any_round_finds_the_same_order_to_the_bit(tmp_path: Path, anew: Ended) -> None:
    units = 5
    broken_off(tmp_path, units + 2, "test", *ANEW, stage="validation_step")  # in the first round
    broken_off(tmp_path, units, "test", *ANEW, stage="validation_step")  # in the second, after the rest of the first
    ended = command(tmp_path, "test", *ANEW)
    assert ended.code == 0, ended.err
    last = max(int(path.name.split("_")[1]) for path in tmp_path.glob("lightning_logs/version_*"))
    for name in WRITTEN:
        assert (ended.directory(last) / name).read_bytes() == (anew.directory(0) / name).read_bytes(), name
    assert len(list((tmp_path / "lightning_logs" / "units" / "rescored").iterdir())) == 2


@pytest.mark.slow
def test_two_processes_find_the_same_order_to_the_bit(tmp_path: Path, anew: Ended) -> None:
    two = run(tmp_path, "test", *ANEW, processes=2)
    assert two.code == 0, two.err
    for name in WRITTEN:
        assert (two.directory(0) / name).read_bytes() == (anew.directory(0) / name).read_bytes(), name


def test_an_order_of_an_earlier_calibration_is_taken_as_far_as_it_goes(anew: Ended) -> None:
    again = command(anew.folder, "test", *ANEW, "--calibration-file", "lightning_logs/version_0")
    assert again.code == 0, again.err
    last = max(int(path.name.split("_")[1]) for path in anew.folder.glob("lightning_logs/version_*"))
    assert masked_of(again, last) == masked_of(anew)
    for counts, direction in (("20", "most"), ("3", "least")):
        words = ("--mask-spec", f"grow:calibration:gradient_abs:{direction}:rescored:{counts}", *ANEW[2:])
        refused = command(anew.folder, "test", *words, "--calibration-file", "lightning_logs/version_0")
        assert refused.code == 2
        assert f"in the order {direction} gradient_abs, where the masks need {counts}" in only_message(refused)
    spec = "grow:calibration:gradient_abs:most:rescored:5"
    probe = HeadProbe()
    with headprobe.ablate(probe.backbone, spec, calibration=anew.directory(0)), torch.no_grad():
        probe.backbone(torch.randn(2, *probe.data_config["input_size"]))


def test_several_orders_without_labels_and_a_score_that_needs_them(without_labels: Path) -> None:
    words = ("--ablation", "linear", *UNLABELLED)
    specs = [
        "grow:calibration:stable_rank:least:rescored:3",
        "grow:calibration:residual_variance_after_projection:most:rescored:6",
        "grow:calibration:stable_rank:least:3",
    ]
    (without_labels / "specs.yaml").write_text(json.dumps({"mask_spec": specs}))
    ended = command(without_labels, "test", "--config", "specs.yaml", *words)
    assert ended.code == 0, ended.err
    about = json.loads((ended.directory(0) / "calibration.json").read_text())["rescored"]
    assert [(one["score"], len(one["heads"])) for one in about["orders"]] == [
        ("stable_rank", 5),
        (specs[1].split(":")[2], 7),
    ]
    assert (about["ablation"], about["rounds"]) == ("linear", 3)
    refused = command(without_labels, "test", "--mask-spec", "grow:calibration:taylor_zero:least:rescored:3", *words)
    assert refused.code == 2
    assert "have no such score" in only_message(refused)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("grow:calibration:gradient_abs:rescored", "got 'rescored': write least:rescored or most:rescored"),
        ("grow:calibration:gradient_abs:least:resored", "expected rescored, or counts such as 6-24/6"),
        ("grow:some/run:nll_rise:least:rescored", "only scores of the run's own calibration are computed anew"),
        ("grow:calibration:nothing:least:rescored", "expected a score of the run's own calibration"),
        ("grow:calibration:gradient_abs:least:rescored:25", "expected 0 to 24 of them, got 25"),
    ],
)
def test_what_cannot_be_scored_anew_is_refused_before_anything_runs(tmp_path: Path, spec: str, reason: str) -> None:
    ended = command(tmp_path, "test", "--mask-spec", spec, *FEW)
    assert ended.code == 2
    assert reason in only_message(ended)
    assert not (tmp_path / "lightning_logs").exists()


def test_a_plain_trainer_is_refused_for_orders_that_are_scored_anew(tmp_path: Path) -> None:
    probe = HeadProbe()
    probe.choose_masks("grow:calibration:gradient_abs:least:rescored:3")
    data = headprobe.ImageNetDataModule(max_images=20, num_workers=0)
    options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "default_root_dir": tmp_path}
    trainer = lightning.Trainer(enable_progress_bar=False, enable_checkpointing=False, **options)
    with pytest.raises(UsageError, match="masks in the order of a score need a calibration"):
        trainer.test(probe, datamodule=data, verbose=False)


def test_a_dry_run_counts_the_rounds(tmp_path: Path) -> None:
    ended = command(tmp_path, "test", *ANEW, "--dry-run")
    assert ended.code == 0, ended.err
    assert "rescored: 2 rounds over the calibration images, one after each tenth of the heads" in ended.out
    assert "to score heads anew" in ended.out
    assert not (tmp_path / "lightning_logs").exists()
