"""Calibrations of few, odd or unreadable images, of odd models, and files that are none: each works or says why not."""

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.numpy import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

import headprobe
from headprobe.backbone.weights import save_backbone
from headprobe.calibration import slots
from headprobe.calibration.constants import Calibration, LayerConstants, read_calibration
from headprobe.data.parts import calibrates
from headprobe.describe.head_outputs import head_outputs
from headprobe.errors import UsageError
from headprobe.module import HeadProbe
from tests.cli_runs import Ended, command, only_message
from tests.forked import digits
from tests.test_resample import spoilt

pytestmark = pytest.mark.usefixtures("no_pictures")

RUN = ("test", "--data.num_workers", "0", "--trainer.accelerator", "cpu", "--trainer.logger", "false")
KINDS = ("--ablation", "zero,mean,linear,position")
FEW = ("--data.max_images", "60")
LAYER = (*RUN, "--mask-spec", "layer:3", *KINDS)


def record(ended: Ended, version: int = 0) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((ended.directory(version) / "run.json").read_text())
    return content


def rises(ended: Ended) -> dict[tuple[str, str], float]:
    assert ended.code == 0, ended.err
    assert {row["nonfinite"] for row in ended.rows()} == {"0"}
    return {(row["mask"], row["ablation"]): float(row["nll_rise"]) for row in ended.rows()[1:]}


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    ended = command(tmp_path_factory.mktemp("half"), *LAYER, *FEW)
    assert ended.code == 0, ended.err
    return ended


# -- few images --------------------------------------------------------------------------------------------------------


def test_one_image_with_fewer_tokens_than_channels_fits_and_is_said_to_be_too_few(tmp_path: Path) -> None:
    words = ("--model.name", "digits_swin", "--data.calibration_images", "1")
    ended = command(tmp_path, *RUN, "--mask-spec", "each:index", *KINDS, *FEW, *words)
    rises(ended)
    layers = read_calibration(ended.directory()).layers
    samples, channels, number = min((layer.samples, layer.mean.size, number) for number, layer in enumerate(layers))
    assert samples < channels
    said = f"1 image fit linear and mean and position, linear by {samples} tokens for {channels} channels in layer "
    assert f"few calibration images: {said}{number}; " in " ".join(ended.out.split())
    assert record(ended)["decisions"]["few calibration images"].startswith(said)
    assert record(ended)["calibration_images"] == 1
    assert "fitted on 1 image of one half" in ended.out


def test_enough_images_are_not_called_few(tmp_path: Path) -> None:
    ended = command(tmp_path, *LAYER, "--data.max_images", "150")
    assert ended.code == 0, ended.err
    assert "few calibration images" not in record(ended)["decisions"]


def test_one_image_that_fits_and_one_that_is_judged_are_a_run(tmp_path: Path) -> None:
    assert [calibrates(0, row) for row in range(2)] == [True, False]
    digits(tmp_path / "set", 2, 1)
    ended = command(tmp_path, *LAYER, "--data.path", "set")
    rises(ended)
    assert [row["images"] for row in ended.rows()] == ["1"] * 5
    assert [row["nll_rise_low"] for row in ended.rows()[1:]] == [""] * 4  # one image has no spread
    assert "fitted on 1 image of one half, by a hash of unit and row; judged on 1 other" in ended.out


@pytest.mark.parametrize("part", ["calibrate", "judge"])
def test_an_empty_half_is_refused_before_anything_is_fitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    monkeypatch.setattr("headprobe.data.parts.calibrates", lambda unit, row: part == "judge")
    for more in ((), ("--dry-run",)):
        ended = command(tmp_path, *LAYER, *FEW, *more)
        assert ended.code == 2
        assert f"no image is left to {part} with --data.calibration half" in only_message(ended)
    assert not (tmp_path / "lightning_logs").exists()


@pytest.mark.parametrize("rule", ["half", "same", "split:train"])
def test_more_images_than_there_are_is_refused_with_their_number(tmp_path: Path, rule: str) -> None:
    ended = command(tmp_path, *LAYER, *FEW, "--data.calibration", rule, "--data.calibration_images", "100000")
    assert ended.code == 2
    assert f"the images of --data.calibration {rule}, got 100,000" in only_message(ended)


# -- images that cannot be read ----------------------------------------------------------------------------------------

BAD = [row for row in range(12) if calibrates(0, row)][1:3]  # of the half that calibrates


def test_an_unreadable_image_of_the_half_that_fits_fails_the_run_before_anything_is_judged(tmp_path: Path) -> None:
    ended = command(spoilt(tmp_path, BAD), *LAYER, "--data.path", "set")
    assert ended.code == 1
    message = only_message(ended)
    assert "2 calibration images could not be used, so nothing was fitted" in message
    assert all(f"row {row}: " in message for row in BAD)
    assert "--data.on_bad_image skip fits on the others" in message
    assert not (ended.directory() / "masks.csv").exists()


@pytest.mark.parametrize("policy", ["skip", "wrong"])
def test_unreadable_images_of_the_half_that_fits_are_left_out_and_said(tmp_path: Path, policy: str) -> None:
    ended = command(spoilt(tmp_path, BAD), *LAYER, "--data.path", "set", "--data.on_bad_image", policy)
    rises(ended)
    fit = sum(calibrates(0, row) for row in range(12)) - len(BAD)
    said = f"2 calibration images could not be read; constants are of the {fit} others"
    assert said in ended.out
    assert record(ended)["decisions"]["unread calibration images"] == said
    assert record(ended)["calibration_images"] == fit
    assert {row["images"] for row in ended.rows()} == {str(12 - fit - len(BAD))}  # none of them counts as wrong

    about = json.loads((ended.directory() / "calibration.json").read_text())
    assert (about["images"], about["images_left_out"]) == (fit, len(BAD))
    tokens = load_file(ended.directory() / "calibration.safetensors")["layers.0.samples"]
    assert int(tokens) % fit == 0


def test_an_unreadable_image_of_the_half_that_judges_fits_all_the_same(tmp_path: Path) -> None:
    judged = [row for row in range(12) if not calibrates(0, row)]
    words = ("--data.path", "set", "--data.on_bad_image", "skip")
    ended = command(spoilt(tmp_path, judged[:1]), *LAYER, *words)
    rises(ended)
    assert record(ended)["calibration_images"] == 12 - len(judged)
    assert {row["images"] for row in ended.rows()} == {str(len(judged) - 1)}


def test_a_half_of_unreadable_images_alone_is_one_message(tmp_path: Path) -> None:
    rows = [row for row in range(12) if calibrates(0, row)]
    ended = command(spoilt(tmp_path, rows), *LAYER, "--data.path", "set", "--data.on_bad_image", "skip")
    assert ended.code == 1
    assert f"no image was scored ({len(rows)} images could not be used)" in only_message(ended)


# -- odd models --------------------------------------------------------------------------------------------------------


def changed_model(folder: Path, change: Callable[[Any], None]) -> tuple[str, ...]:
    """Write the weights of the bundled model with a change, and return the options that load them."""
    probe = HeadProbe()
    with torch.no_grad():
        change(probe.backbone)
    save_backbone(probe.backbone, folder / "changed.safetensors", replace(probe.source, weights=None))
    return ("--model.weights", "changed.safetensors")


def values_of(model: Any, layer: int, head: int) -> tuple[Any, Any]:
    """The weight and bias of a head's values in the joint projection."""
    width = model.embed_dim
    rows = slice(2 * width + head * width // 4, 2 * width + (head + 1) * width // 4)
    qkv = model.blocks[layer].attn.qkv
    return qkv.weight[rows], qkv.bias[rows]


def test_a_head_that_always_says_the_same_costs_nothing_under_any_fitted_kind(tmp_path: Path) -> None:
    def constant(model: Any) -> None:
        weight, bias = values_of(model, 3, 1)
        weight.zero_()
        bias.fill_(0.5)

    words = ("--mask-spec", "head:3.1", *KINDS, *FEW)
    found = rises(command(tmp_path, *RUN, *words, *changed_model(tmp_path, constant)))
    for kind in ("mean", "linear", "position"):
        assert found["head:3.1", kind] == pytest.approx(0, abs=1e-5)
    assert abs(found["head:3.1", "zero"]) > 1e-4


def test_a_head_that_another_repeats_costs_nothing_under_linear(tmp_path: Path) -> None:
    def repeated(model: Any) -> None:
        width, qkv = model.embed_dim, model.blocks[3].attn.qkv
        for part in range(3):  # queries, keys and values of head 2 are those of head 1: the covariance has no full rank
            start = part * width
            for tensor in (qkv.weight, qkv.bias):
                tensor[start + width // 2 : start + 3 * width // 4] = tensor[start + width // 4 : start + width // 2]

    words = ("--mask-spec", "head:3.1", *KINDS, *FEW)
    found = rises(command(tmp_path, *RUN, *words, *changed_model(tmp_path, repeated)))
    assert found["head:3.1", "linear"] == pytest.approx(0, abs=1e-4)
    assert abs(found["head:3.1", "mean"]) > 1e-3


def test_layers_without_any_variance_get_their_constants(tmp_path: Path) -> None:
    def silent(model: Any) -> None:
        for head in range(4):
            values_of(model, 3, head)[0].zero_()

    words = ("--mask-spec", "head:3.0,3", *KINDS, *FEW)
    found = rises(command(tmp_path, *RUN, *words, *changed_model(tmp_path, silent)))
    for kind in ("mean", "linear", "position"):
        assert found["head:3.0,3", kind] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("kind", ["mean", "linear", "position", "optimal"])
def test_nan_in_a_head_is_one_message_with_the_layer(tmp_path: Path, kind: str) -> None:
    words = changed_model(tmp_path, lambda model: values_of(model, 3, 1)[1].fill_(float("nan")))
    ended = command(tmp_path, *RUN, "--mask-spec", "head:1.0", "--ablation", kind, *FEW, *words)
    assert ended.code == 2
    assert only_message(ended).startswith("model 'digits_vit' gives NaN or infinite logits")
    assert not ended.directory().exists()


@pytest.mark.parametrize("kind", ["mean", "linear", "position"])
def test_an_image_that_makes_a_head_nan_fits_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    real = head_outputs

    def broken(record: Any, facts: Any) -> torch.Tensor:
        found = real(record, facts).clone()
        found[-1, 0, 1] = torch.inf - torch.inf
        return found

    monkeypatch.setattr(slots, "head_outputs", broken)
    ended = command(tmp_path, *RUN, "--mask-spec", "head:1.0", "--ablation", kind, *FEW)
    assert ended.code == 1
    assert "of layer 0 holds NaN or infinity: nothing can be fitted" in only_message(ended)
    assert not (ended.directory() / "masks.csv").exists()


def test_bf16_weights_give_the_constants_and_numbers_of_float32_within_their_rounding(tmp_path: Path) -> None:
    words = (*RUN, "--mask-spec", "each:index", *KINDS, "--data.max_images", "100")
    full, short = (command(tmp_path, *words, "--trainer.precision", name) for name in ("32-true", "bf16-true"))
    one, other = (load_file(short.directory(version) / "calibration.safetensors") for version in (0, 1))
    eps = torch.finfo(torch.bfloat16).eps
    for name, values in one.items():
        if name.endswith("resolution"):
            assert (float(values), float(other[name])) == (torch.finfo(torch.float32).eps, eps)
        else:
            scale = np.abs(values).max()
            np.testing.assert_allclose(other[name], values, atol=8 * eps * scale, rtol=0, err_msg=name)
    assert full.code == short.code == 0
    for before, after in zip(full.rows(0), short.rows(1), strict=True):
        assert float(after["nll"]) == pytest.approx(float(before["nll"]), abs=0.05, rel=0.05), after["mask"]


# -- files that are no calibration of this model -----------------------------------------------------------------------


def again(half: Ended, *words: str, spec: str = "layer:3", kinds: str = "mean") -> Ended:
    file = ("--calibration-file", str(half.directory()))
    return command(half.folder, *RUN, "--mask-spec", spec, "--ablation", kinds, *FEW, *file, *words)


@pytest.mark.parametrize(
    ("options", "differs"),
    [
        ("{pretrained_cfg_overlay: {mean: [0.1, 0.1, 0.1]}}", "data_config"),
        ("{pretrained_cfg_overlay: {crop_pct: 0.5}}", "data_config"),
        ("{img_size: 64}", "weights_sha256"),
    ],
)
def test_another_transform_or_resolution_is_refused(half: Ended, options: str, differs: str) -> None:
    (half.folder / "other.yaml").write_text(f"model: {{options: {options}}}\n")
    ended = again(half, "--config", "other.yaml")
    assert ended.code == 2
    message = only_message(ended)
    assert "fitted on another model, or on images prepared in another way" in message
    assert differs in message


def test_other_weights_of_the_same_model_are_refused(half: Ended) -> None:
    words = changed_model(half.folder, lambda model: model.blocks[0].attn.proj.bias.add_(1e-3))
    ended = again(half, *words)
    assert ended.code == 2
    assert "(weights_sha256 differ)" in only_message(ended)


def test_a_model_in_hand_refuses_constants_of_another_resolution() -> None:
    model = timm.create_model("test_vit", num_classes=3, dynamic_img_size=True).eval()
    probe = HeadProbe("test_vit", pretrained=False, num_classes=3, options={"dynamic_img_size": True})
    probe.backbone.load_state_dict(model.state_dict())
    layers = [LayerConstants(1, np.zeros((layer.heads, layer.head_dim))) for layer in probe.layout.layers]
    fitted = Calibration(layers, {"model": json.loads(json.dumps(probe.identity()))})
    with headprobe.ablate(model, "layer:1", ablation="mean", calibration=fitted):
        model(torch.zeros(1, 3, 160, 160))
    with (
        pytest.raises(UsageError, match=r"fitted on images of \(3, 160, 160\): give input_size .* got \(3, 96, 96\)$"),
        headprobe.ablate(model, "layer:1", ablation="mean", calibration=fitted, input_size=(3, 96, 96)),
    ):
        pass


def test_constants_of_means_do_not_serve_linear(half: Ended, tmp_path: Path) -> None:
    means = command(tmp_path, *RUN, "--mask-spec", "layer:3", "--ablation", "mean", *FEW)
    for kind in ("linear", "position", "optimal"):
        ended = again(means, kinds=f"mean,{kind}")
        assert ended.code == 2
        assert f"got {kind}" in only_message(ended) or "got no constant" in only_message(ended)


def test_a_number_of_calibration_images_beside_given_constants_is_refused(half: Ended) -> None:
    ended = again(half, "--data.calibration_images", "5")
    assert ended.code == 2
    assert "leave one of the two out, got 5" in only_message(ended)


def test_a_calibration_file_without_a_fitted_ablation_is_refused(half: Ended) -> None:
    ended = again(half, kinds="zero")
    assert ended.code == 2
    assert "--calibration-file is for ablations that are fitted" in only_message(ended)


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def without_end(content: bytes) -> bytes:
    return content[:-1]


def header_alone(content: bytes) -> bytes:
    return content[: 8 + int.from_bytes(content[:8], "little")]


@pytest.mark.parametrize(
    "spoil",
    [
        truncated,
        without_end,
        header_alone,
        lambda _: b"",
        lambda _: b"\0" * 100,
        lambda _: b"\xff" * 100,
        lambda _: pickle.dumps({"layers.0.mean": [0.0] * 9}),
        lambda _: b"PK\x03\x04 a checkpoint of torch",
    ],
    ids=["half", "last byte", "header", "empty", "zeros", "ones", "pickle", "zip"],
)
def test_a_broken_file_is_refused_in_one_line(half: Ended, tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "calibration.safetensors"
    path.write_bytes(spoil((half.directory() / path.name).read_bytes()))
    with pytest.raises(UsageError, match=rf"does not hold constants of a headprobe calibration .* got '{path}'$"):
        read_calibration(path)


def test_a_broken_file_is_one_line_on_the_command_line(half: Ended, tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(pickle.dumps([0.0] * 9))
    ended = again(half, "--calibration-file", str(tmp_path / "broken.safetensors"))
    assert ended.code == 2
    assert "broken.safetensors does not hold constants of a headprobe calibration" in only_message(ended)
    assert only_message(ended).count("\n") == 1


def test_a_folder_without_a_calibration_is_refused(half: Ended, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere.safetensors"):
        ended = again(half, "--calibration-file", str(path))
        assert ended.code == 2
        assert f"must name a run with a calibration.safetensors, or that file, got '{path}'" in only_message(ended)


def rewritten(half: Ended, folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> str:
    """Change the arrays or the metadata of a calibration, write it and return its path."""
    arrays = dict(load_file(half.directory() / "calibration.safetensors"))
    about = dict(read_calibration(half.directory()).about)
    change(arrays, about)
    path = folder / "calibration.safetensors"
    save_file(arrays, path, metadata={"headprobe": json.dumps(about)})
    return str(path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda arrays, _: arrays["layers.3.mean"].fill(np.nan), "layers.3.mean holds NaN or infinity"),
        (lambda arrays, _: arrays["layers.3.covariance"].fill(np.inf), "layers.3.covariance holds NaN or infinity"),
        (lambda arrays, _: arrays.pop("layers.2.mean"), "layers.2.mean"),
        (lambda arrays, _: [arrays.pop(name) for name in list(arrays) if name.startswith("layers.5")], "every head"),
        (lambda _, about: about.pop("data"), "does not say which images it was fitted on"),
        (lambda _, about: about.pop("model"), "fitted on another model"),
    ],
    ids=["nan", "infinity", "a mean", "a layer", "data", "model"],
)
def test_a_file_that_someone_changed_is_refused_in_one_line(
    half: Ended, tmp_path: Path, change: Callable[[Any, Any], None], reason: str
) -> None:
    probe = HeadProbe()
    probe.choose_masks("layer:3", "mean")
    with pytest.raises(UsageError, match=reason) as error:
        probe.use_calibration(rewritten(half, tmp_path, change))
    assert "\n" not in str(error.value)


def test_metadata_that_are_no_object_are_refused(half: Ended, tmp_path: Path) -> None:
    path = tmp_path / "calibration.safetensors"
    save_file(dict(load_file(half.directory() / path.name)), path, metadata={"headprobe": "[1, 2]"})
    with pytest.raises(UsageError, match="headprobe must be an object, got list"):
        read_calibration(path)


# -- what results say --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["same", "half"])
def flagged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Ended]:
    words = (*RUN[:-2], "--mask-spec", "each:layer", "--ablation", "zero,mean", *FEW)
    ended = command(tmp_path_factory.mktemp(request.param), *words, "--data.calibration", request.param)
    assert ended.code == 0, ended.err
    return request.param, ended


def test_every_table_says_which_images_fitted(flagged: tuple[str, Ended]) -> None:
    rule, ended = flagged
    wanted = {"none": "", "zero": "", "mean": rule}
    assert all(row["calibration"] == wanted[row["ablation"]] for row in ended.rows())
    run = headprobe.load_run(ended.directory()).files
    assert run.calibration == rule
    compared = run.table("ablations.csv")
    assert compared is not None
    assert set(compared["calibration"].tolist()) == {rule}
    flags = ended.out.count("judged on the images that fitted the constants")
    assert flags == (2 if rule == "same" else 0)  # both printed tables


def test_the_records_say_how_many_images_fitted_and_judged_and_which(flagged: tuple[str, Ended]) -> None:
    rule, ended = flagged
    found = record(ended)
    about = json.loads((ended.directory() / "calibration.json").read_text())
    assert found["data"]["rows"] == {"rule": rule, "calibrates": False}
    assert about["data"]["rows"] == {"rule": rule, "calibrates": True, "most_images": None}
    fit, judged = found["calibration_images"], found["data"]["images"]
    assert (about["images"], judged) == (fit, int(ended.rows()[0]["images"]))
    assert fit + judged == (120 if rule == "same" else 60)
    said = found["decisions"]["calibration"]
    assert said in " ".join(ended.out.split())
    if rule == "same":
        assert said == "judged on the very images that it was fitted on, 60 of them, which flatters (same)"
    else:
        assert said.startswith(f"fitted on {fit} images of one half, by a hash of unit and row; judged on {judged} ")


def test_tensorboard_names_what_the_judged_images_fitted(flagged: tuple[str, Ended]) -> None:
    rule, ended = flagged
    events = EventAccumulator(str(ended.directory()), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    suffix = "_mean_same" if rule == "same" else "_mean"
    curves = {tag for tag in events.Tags()["scalars"] if tag.startswith("nll_rise/")}
    assert curves == {"nll_rise/by_layer", f"nll_rise/by_layer{suffix}"}
    (text,) = events.Tensors("calibration/text_summary")
    assert text.tensor_proto.string_val[0].decode() == record(ended)["decisions"]["calibration"]
    sessions = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert rule.encode() in sessions


@pytest.mark.parametrize("rule", ["same", "half"])
def test_zero_alone_is_never_said_to_be_fitted(tmp_path: Path, rule: str) -> None:
    ended = command(tmp_path, *RUN, "--mask-spec", "layer:3", *FEW, "--data.calibration", rule)
    assert ended.code == 0, ended.err
    assert "fitted" not in ended.out.replace("nothing is fitted", "")
    assert ("nothing is fitted; judged on 28 images of one half" in ended.out) == (rule == "half")
    assert headprobe.load_run(ended.directory()).files.calibration == ""
    assert {row["calibration"] for row in ended.rows()} == {""}


def test_constants_of_other_data_are_said_to_be(half: Ended, tmp_path: Path) -> None:
    digits(tmp_path / "set", 30, 2)
    ended = again(half, "--data.path", str(tmp_path / "set"))
    assert ended.code == 0, ended.err
    version = max(int(path.name.split("_")[1]) for path in half.folder.glob("lightning_logs/version_*"))
    fit = record(half)["calibration_images"]
    said = f"fitted by an earlier run on {fit} images of digits, split test (half); judged on 30 others"
    assert record(ended, version)["decisions"]["calibration"] == said
    assert said in " ".join(ended.out.split())
    assert [row["calibration"] for row in ended.rows(version)] == ["", "other"]


def test_constants_of_these_images_are_flagged_where_they_judge_them(half: Ended) -> None:
    ended = again(half, "--data.calibration", "same")
    assert ended.code == 0, ended.err
    assert "judged on 60 images, these among them, which flatters (same)" in " ".join(ended.out.split())
    assert "judged on the images that fitted the constants" in ended.out
