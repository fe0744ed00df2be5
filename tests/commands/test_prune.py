"""`prune`: wrong requests leave nothing behind; what is written is the model of the run's own mask."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only

import headprobe
from headprobe.backbone.sandbox import relative
from headprobe.calibration.constants import digest_of, read_calibration
from headprobe.commands.prune import PruneCLI
from headprobe.data.datamodule import ImageNetDataModule
from headprobe.errors import RunError
from headprobe.module import HeadProbe
from headprobe.pruning import cost, refit
from headprobe.pruning.make import _of_speed
from tests.cli_runs import QUICK, Ended, command, only_message
from tests.report.page.page_oracle import check_page

FAST = ("--pairs", "1", "--trainer.enable_progress_bar", "false")


def prune(folder: Path, *words: str) -> Ended:
    return command(folder, "prune", *QUICK, *FAST, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "prune needs the folder of the smaller model: give --output DIR"),
        (("--output", "new"), "prune needs the heads to remove: give --mask-spec, --keep-top1 or --speed"),
        (("--output", ".", "--mask-spec", "layer:1"), "the new folder must not exist yet"),
        (("--output", "new", "--mask-spec", "each:layer"), "takes a --mask-spec of one mask, got each:layer with 6"),
        (("--output", "new", "--mask-spec", "random:0"), "a mask must hit heads that are to be removed"),
        (("--output", "new", "--mask-spec", "layer:1", "--ablation", "zero,mean"), "prune takes one --ablation"),
        (("--output", "new", "--mask-spec", "layer:1", "--ablation", "position"), "position cannot be folded into"),
        (("--output", "new", "--mask-spec", "layer:1", "--ablation", "resample"), "it takes heads of another image"),
        (("--output", "new", "--mask-spec", "layer:1", "--dry-run"), "prune has no --dry-run"),
        (("--output", "new", "--mask-spec", "layer:1", "--pairs", "0"), "--pairs must be 1 or more, got 0"),
        (("--output", "new", "--mask-spec", "layer:1", "--refit"), "--refit is for --ablation linear, got zero"),
        (("--output", "new", "--mask-spec", "layer:1", "--trainer.precision", "bf16-true"), "its model in float"),
        (("--output", "new", "--keep-top1", "0"), "between 0 and 100, got 0"),
        (("--output", "new", "--speed", "1"), "--speed must be more than 1"),
        (("--output", "new", "--speed", "2", "--keep-top1", "1"), "choose in two ways"),
        (("--output", "new", "--keep-top1", "1", "--refit"), "--refit gives another model than those that were judged"),
        (("--output", "new", "--keep-top1", "1", "--mask-spec", "grow:other:drop_pp"), "must have no part"),
        (("--output", "new", "--keep-top1", "1", "--mask-spec", "each:layer"), "choose among nested sets"),
        (("--output", "new", "--keep-top1", "40", "--data.calibration", "same"), "shows nothing on the images"),
        (("--output", "new", "--keep-top1", "40", "--model.classifier", "none"), "--keep-top1 counts right answers"),
        (("--output", "x" * 300, "--mask-spec", "layer:1"), "the new folder cannot have this name"),
        (("--output", "new", "--keep-top1", "1"), "judged images cannot show that a set loses at .* give at least 299"),
        (("--output", "new", "--mask-spec", "layer:1", "--model.name", "vit_relpos_small_patch16_224",
          "--model.pretrained", "false"), "no head of 'blocks.1.attn' can be removed: its class is not among"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_one_message_and_writes_nothing(tmp_path: Path, words: Any, message: str) -> None:
    ended = prune(tmp_path, *words)
    assert ended.code == 2
    found = only_message(ended)
    assert all(part in found for part in message.split(" .* ")), found
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "lightning_logs" / "version_0").exists()


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Prune the bundled ViT under linear, on half of 100 images."""
    words = ("--mask-spec", "layer:3+head:0.1,2", "--ablation", "linear", "--data.max_images", "100")
    return prune(tmp_path_factory.mktemp("linear"), *words, "--output", "small")


def test_it_prints_what_the_smaller_model_costs_and_the_proof(linear: Ended) -> None:
    assert linear.code == 0, linear.err
    lines = linear.out.splitlines()
    titles = [line.split("  ")[0] for line in lines]
    assert "digits_vit without 6 of 24 heads (layer:3+head:0.1,2, linear); 1 layer without heads, a bias each" in lines
    assert {"parameters", "multiply-adds", "ms a batch of 1", "ms a batch of 64"} <= set(titles)
    assert "on 4 images of noise and 16 real ones in float32 (limit 1e-05)" in linear.out


def test_what_is_written_gives_the_logits_of_the_masked_model(linear: Ended) -> None:
    small = headprobe.load_pruned(linear.folder / "small")
    whole = HeadProbe("digits_vit").backbone
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    masked = headprobe.ablate(
        whole, "layer:3+head:0.1,2", ablation="linear", calibration=linear.directory(), input_size=(3, 32, 32)
    )
    with torch.inference_mode():
        with masked:
            expected = whole(images)
        assert relative(small(images), expected) < 1e-5
        assert relative(whole(images), expected) > 1e-3


def test_the_folder_says_where_the_model_comes_from(linear: Ended) -> None:
    own = json.loads((linear.folder / "small" / "config.json").read_text())["headprobe"]
    run = json.loads((linear.directory() / "run.json").read_text())
    assert own["parent"] == {"name": "digits_vit", "weights_sha256": run["model"]["weights_sha256"]}
    assert own["mask"]["masked_heads"] == {"0": [1, 2], "3": [0, 1, 2, 3]}
    assert own["calibration"]["sha256"] == digest_of(read_calibration(linear.directory()))
    assert own["calibration"]["images"] == json.loads((linear.directory() / "calibration.json").read_text())["images"]
    assert own["ablation"] == "linear"
    assert own["proof"]["difference"] < 1e-5
    assert own["command"].startswith("headprobe prune ")
    card = (linear.folder / "small" / "README.md").read_text()
    assert "| blocks.0.attn | 2 | 4 | 0,3 |" in card
    assert own["mask"]["digest"] in card


def test_the_pruned_model_is_scored_on_the_same_images_as_the_masked_one(linear: Ended) -> None:
    words = ("--data.max_images", "100", "--data.num_workers", "0", "--data.calibration", "half", "--ablation", "mean")
    again = command(linear.folder, "test", "--model.name", "local-dir:small", *words, "--mask-spec", "head:0.0")
    assert again.code == 0, again.err
    masked, pruned = linear.rows()[1], again.rows(1)[0]
    assert pruned["images"] == masked["images"]
    assert pruned["top1"] == masked["top1"]
    assert float(pruned["nll"]) == pytest.approx(float(masked["nll"]), rel=1e-5)
    assert "which do not judge it fairly" in again.out + again.err


def test_the_folder_of_the_run_has_the_smaller_model_and_its_page(linear: Ended) -> None:
    made = json.loads((linear.directory() / "pruned.json").read_text())
    own = json.loads((linear.folder / "small" / "config.json").read_text())["headprobe"]
    assert made.pop("schema") == 1
    assert made.pop("curve") == {}
    assert made == {name: own[name] for name in made}
    assert {"mask", "ablation", "calibration", "proof", "cost", "command"} <= made.keys()
    assert "pruned" in check_page(linear.directory())
    assert 'id="pruned"' in (linear.directory() / "report.html").read_text(encoding="utf-8")


def test_other_processes_leave_opening_the_data_to_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    second: Any = PruneCLI.__new__(PruneCLI)  # as `--trainer.devices 2` starts it
    second.words = ["prune"]
    second.config = {"test": SimpleNamespace(keep_top1=40.0, speed=None, data=SimpleNamespace(path="digits"))}
    second.model, second.datamodule = SimpleNamespace(fits=True), ImageNetDataModule()
    second.before_test()  # would fail where it asked for the number of images


def test_zero_needs_no_images(tmp_path: Path) -> None:
    ended = prune(tmp_path, "--model.name", "test_vit", "--model.pretrained", "false", "--mask-spec", "layer:1",
                  "--output", "small")  # fmt: skip
    assert ended.code == 0, ended.err
    assert "on 4 images of noise in float32" in ended.out
    assert (
        "note: no images were read, so nothing was judged: there is no run in lightning_logs and no page" in ended.out
    )
    own = json.loads((tmp_path / "small" / "config.json").read_text())["headprobe"]["cost"]
    card = (tmp_path / "small" / "README.md").read_text()
    assert "| parameters | {:,} to {:,} |".format(*own["parameters"]) in card
    assert "| a batch of 64 |" in card
    assert not (tmp_path / "lightning_logs").exists()


def test_a_pruned_model_is_pruned_again_by_the_command(tmp_path: Path) -> None:
    assert prune(tmp_path, "--mask-spec", "layer:3+head:0.0", "--output", "one").code == 0
    ended = prune(tmp_path, "--model.name", "local-dir:one", "--mask-spec", "head:0.1+layer:3", "--output", "two")
    assert ended.code == 0, ended.err
    assert (ended.directory(1) / "report.html").exists()  # its images are bundled, as those of the whole model
    layers = json.loads((tmp_path / "two" / "config.json").read_text())["headprobe"]["layers"]
    kept = {name: layer["kept"] for name, layer in layers.items()}
    assert kept == {"blocks.0.attn": [1, 3], "blocks.3.attn": [], "blocks.4.attn": []}
    one, two = (headprobe.load_pruned(tmp_path / name) for name in ("one", "two"))
    assert sum(p.numel() for p in two.parameters()) < sum(p.numel() for p in one.parameters())


def test_a_model_pruned_twice_says_all_that_was_done_to_it(linear: Ended) -> None:
    words = ("--model.name", "local-dir:small", "--mask-spec", "head:0.0", "--output", "twice")
    ended = prune(linear.folder, *words)
    assert ended.code == 0, ended.err
    once, own = (
        json.loads((linear.folder / name / "config.json").read_text())["headprobe"] for name in ("small", "twice")
    )
    assert own["parent"]["pruned"] == {name: once[name] for name in ("parent", "mask", "ablation", "calibration")}
    said = {one.about: one.text for one in HeadProbe(f"local-dir:{linear.folder / 'twice'}").decisions()}["pruned"]
    assert "7 heads of 8 removed in 2 layers before (layer:3+head:0.1,2, linear, then head:0.0, zero)" in said
    assert f"fitted on {once['calibration']['images']} images of digits, which do not judge it fairly" in said
    card = (linear.folder / "twice" / "README.md").read_text()
    assert "Its logits are those of its parent, which was pruned before, under the mask." in card
    assert "| pruned before | `layer:3+head:0.1,2`, linear |" in card


def test_how_it_is_used_can_be_copied(tmp_path: Path) -> None:
    ended = prune(tmp_path, "--mask-spec", "layer:1", "--output", "my small")
    assert (
        "use it: headprobe test --model.name 'local-dir:my small' ..., or headprobe.load_pruned('my small')"
        in ended.out
    )
    ended = prune(tmp_path, "--mask-spec", "layer:0-5", "--output", "none")
    assert ended.code == 0, ended.err
    assert "use it: headprobe.load_pruned('none'); headprobe test masks heads, and it has none" in ended.out
    assert headprobe.load_pruned(tmp_path / "none")(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_a_model_that_is_slower_than_when_it_was_chosen_is_said() -> None:
    measured = cost.Latency(64, (1.0, 1.0, 1.0), (0.8, 0.9, 0.9))
    assert _of_speed(measured, 1.05) == []
    assert _of_speed(measured, None) == []
    (line,) = _of_speed(measured, 1.3)
    assert line.startswith("note: 1.3x was wanted and measured when the set was chosen; measured again it is 1.11x")


def stopped(*_: Any) -> None:
    raise RunError("stopped, got a stop")


def test_refitting_fits_each_layer_in_the_model_that_is_pruned_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--mask-spec", "head:1.0,1+head:2.0+head:4.3", "--ablation", "linear", "--data.max_images", "200")
    plain = prune(tmp_path, *words, "--output", "plain")
    fitted_layers = iter([refit._in_smaller])  # of the second layer; then the command is stopped
    with monkeypatch.context() as patch:
        patch.setattr(refit, "_in_smaller", lambda *given: next(fitted_layers, stopped)(*given))
        assert prune(tmp_path, *words, "--refit", "--output", "refitted").code == 1
    refitted = prune(tmp_path, *words, "--refit", "--output", "refitted")
    assert (plain.code, refitted.code) == (0, 0), refitted.err
    assert refitted.out.count("All of it was scored before") == 2  # the first and the second layer
    first, second = read_calibration(plain.directory(0)), read_calibration(refitted.directory(1))
    assert second.about["refitted"] == ["blocks.2.attn", "blocks.4.attn"]
    means = [(a.mean == b.mean).all() for a, b in zip(first.layers, second.layers, strict=True)]
    assert means == [True, True, False, True, False, True]
    # the oracle: layer 2's slots in the whole model whose layer 1 is masked by plain linear
    again = prune(tmp_path, "--mask-spec", "head:1.0,1", "--ablation", "linear", "--data.max_images", "200",
                  "--output", "step")  # fmt: skip
    assert again.code == 0
    step = command(tmp_path, "test", "--model.name", "local-dir:step", "--mask-spec", "head:2.0", "--ablation",
                   "linear", "--data.max_images", "200", "--data.num_workers", "0")  # fmt: skip
    assert step.code == 0
    fitted = read_calibration(step.directory(3))
    assert fitted.layers[2].mean == pytest.approx(second.layers[2].mean, rel=1e-6, abs=1e-9)


def test_the_largest_set_that_is_shown_to_lose_little_is_removed(tmp_path: Path) -> None:
    words = ("--keep-top1", "40", "--ablation", "linear", "--data.max_images", "200")
    ended = prune(tmp_path, *words, "--output", "small")
    assert ended.code == 0, ended.err
    with (tmp_path / "small" / "curve.csv").open(encoding="utf-8", newline="") as file:
        curve = list(csv.DictReader(file))
    rows = ended.rows()[1:]
    assert [row["right_to_wrong"] for row in curve] == [row["right_to_wrong"] for row in rows]
    passed = [float(row["limit_pp"]) <= 40 for row in curve]
    expected = passed.index(False) - 1
    assert [row["chosen"] == "1" for row in curve].index(True) == expected
    own = json.loads((tmp_path / "small" / "config.json").read_text())["headprobe"]
    assert own["mask"]["spec"] == rows[expected]["mask"]
    assert own["chosen_by"] == {"keep_top1_pp": 40.0}
    assert headprobe.load_pruned(tmp_path / "small") is not None
    made = json.loads((ended.directory() / "pruned.json").read_text())["curve"]
    assert made == {name: [float(row[name]) for row in curve] for name in curve[0]}
    assert "pruned" in check_page(ended.directory())


def test_where_no_set_is_shown_to_do_nothing_is_written(tmp_path: Path) -> None:
    words = ("--keep-top1", "4", "--mask-spec", "grow:calibration:gradient_abs:most", "--data.max_images", "200")
    ended = prune(tmp_path, *words, "--output", "small")
    assert ended.code == 1
    assert "even the first set, of 1 head, may lose" in ended.err
    assert not (tmp_path / "small").exists()


def test_the_smallest_set_that_is_fast_enough_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def by_parameters(models: Any, input_size: Any, batch: int, pairs: int) -> Any:
        counts = [float(cost.parameters_of(model)) for model in models]
        return cost.Latency(batch, (counts[0],), (counts[1],))

    monkeypatch.setattr("headprobe.pruning.choose_in_run.latency", by_parameters)
    words = ("--speed", "1.1", "--ablation", "linear", "--data.max_images", "100")
    ended = prune(tmp_path, *words, "--output", "small")
    assert ended.code == 0, ended.err
    with (tmp_path / "small" / "curve.csv").open(encoding="utf-8", newline="") as file:
        curve = {int(row["heads"]): (float(row["speed_batch_64"]), row["chosen"]) for row in csv.DictReader(file)}
    chosen = next(heads for heads, (_, mark) in curve.items() if mark == "1")
    assert curve[chosen][0] >= 1.1 > curve[chosen - 1][0]
    layers = json.loads((tmp_path / "small" / "config.json").read_text())["headprobe"]["mask"]["masked_heads"]
    assert sum(len(heads) for heads in layers.values()) == chosen
    assert len(ended.rows()) == 2
    assert headprobe.load_pruned(tmp_path / "small") is not None


@pytest.mark.parametrize("by_speed", [False, True], ids=["a mask", "a speed"])
def test_what_it_says_to_use_names_the_classifier_that_judged(
    by_speed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headprobe.pruning.choose_in_run.latency", lambda *_: cost.Latency(64, (2.0,), (1.0,)))
    judge = ("--model.classifier", "class-mean", "--data.max_images", "100")
    what = ("--speed", "1.1") if by_speed else ("--mask-spec", "layer:1")
    ended = prune(tmp_path, *what, "--ablation", "mean", *judge, "--output", "small")
    assert ended.code == 0, ended.err
    use = next(line for line in ended.out.splitlines() if line.startswith("use it: "))
    words = use.removeprefix("use it: headprobe ").partition(" ...")[0].split()
    assert words == ["test", "--model.name", "local-dir:small", "--model.classifier", "class-mean"]
    again = command(tmp_path, *words, *judge[2:], *QUICK[2:], "--mask-spec", "layer:0")
    assert again.code == 0, again.err
    masked, pruned = ended.rows()[1], again.rows(1)[0]
    assert pruned["images"] == masked["images"]
