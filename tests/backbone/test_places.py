"""`local-dir:` and `hf-hub:` names: the model, its preprocessing and its classes' names, from safetensors only."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf

from headprobe.backbone.places import located
from headprobe.backbone.weights import ModelSource, create_backbone, create_classifier, weights_digest
from headprobe.errors import RunError, UsageError
from headprobe.module import HeadProbe
from tests.backbone.hub_cache import COMMIT, offline, snapshot
from tests.cli_runs import QUICK, command, only_message
from tests.data.hub_runs import environment
from tests.data.mock_hub import COMMIT as SERVED
from tests.data.mock_hub import running

OPTIONS: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
NAMES = [f"class {number}" for number in range(10)]
IMAGES = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "crop_pct": 0.7, "interpolation": "bilinear"}


def saved(folder: Path, *, safe: bool = True, names: Any = NAMES) -> torch.nn.Module:
    """Save a model as timm does for the hub, with preprocessing of its own."""
    torch.manual_seed(3)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, pretrained_cfg_overlay=IMAGES, **OPTIONS)
    save_for_hf(model, str(folder), model_config={"label_names": names}, safe_serialization=safe)
    return model


def test_a_folder_brings_architecture_weights_preprocessing_and_names(tmp_path: Path) -> None:
    model = saved(tmp_path / "mine")
    made = create_classifier(ModelSource(f"local-dir:{tmp_path / 'mine'}"))
    assert weights_digest(made.backbone) == weights_digest(model)
    assert made.class_names == NAMES
    plain = json.loads(json.dumps({key: made.data_config[key] for key in IMAGES}))
    assert plain == json.loads(json.dumps(IMAGES))
    assert list(made.data_config["input_size"]) == [3, 32, 32]
    images = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(made.backbone(images), model.eval()(images))


def test_names_of_classes_may_be_numbered_and_must_be_complete(tmp_path: Path) -> None:
    saved(tmp_path / "dict", names={str(number): name for number, name in reversed(list(enumerate(NAMES)))})
    assert create_classifier(ModelSource(f"local-dir:{tmp_path / 'dict'}")).class_names == NAMES
    saved(tmp_path / "gaps", names={"0": "one", "7": "seven"})
    assert create_classifier(ModelSource(f"local-dir:{tmp_path / 'gaps'}")).class_names is None
    assert create_classifier(ModelSource("digits_vit")).class_names is None


def test_every_command_takes_a_folder(tmp_path: Path) -> None:
    saved(tmp_path / "mine")
    name = "local-dir:mine"
    scored = command(tmp_path, "test", "--model.name", name, "--mask-spec", "layer:1", *QUICK)
    assert scored.code == 0, scored.err
    record = json.loads((scored.directory() / "run.json").read_text())
    assert record["model"]["architecture"] == "vit_tiny_patch16_224"
    assert record["model"]["options"]["depth"] == 2
    assert record["model"]["data_config"]["crop_pct"] == 0.7
    checked = command(tmp_path, "check", name)
    assert (checked.code, "every proof passed" in checked.out) == (0, True)
    assert "2 layers, 6 heads" in command(tmp_path, "masks", "layer:1", "--model.name", name).out
    assert command(tmp_path, "models", name).code == 0


def test_a_run_continues_where_the_folder_was_moved(tmp_path: Path) -> None:
    saved(tmp_path / "one")
    words = ("--mask-spec", "layer:1", *QUICK)
    first = command(tmp_path, "test", "--model.name", "local-dir:one", *words)
    (tmp_path / "one").rename(tmp_path / "two")
    second = command(tmp_path, "test", "--model.name", "local-dir:two", *words)
    keys = [json.loads((first.directory(version) / "run.json").read_text())["key"] for version in (0, 1)]
    assert (second.code, keys[0]) == (0, keys[1])


def test_only_safetensors_are_opened(tmp_path: Path) -> None:
    saved(tmp_path / "pickled", safe=False)
    with pytest.raises(UsageError, match=r"headprobe convert .*pytorch_model.bin .*model.safetensors"):
        create_classifier(ModelSource(f"local-dir:{tmp_path / 'pickled'}"))
    assert create_backbone(ModelSource(f"local-dir:{tmp_path / 'pickled'}", pretrained=False)) is not None
    # timm itself would take the pickle where the safetensors have another name
    saved(tmp_path / "both")
    (tmp_path / "both" / "model.safetensors").rename(tmp_path / "both" / "best.safetensors")
    (tmp_path / "both" / "pytorch_model.bin").write_bytes(b"never opened")
    assert create_backbone(ModelSource(f"local-dir:{tmp_path / 'both'}")) is not None


def test_another_number_of_classes_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "mine")
    with pytest.raises(UsageError, match=r"has 10 classes; .*got num_classes 7"):
        create_classifier(ModelSource(f"local-dir:{tmp_path / 'mine'}", num_classes=7))


def test_another_size_is_resampled_and_said(tmp_path: Path) -> None:
    saved(tmp_path / "mine")
    made = create_classifier(ModelSource(f"local-dir:{tmp_path / 'mine'}", options={"img_size": 64}))
    assert list(made.data_config["input_size"]) == [3, 64, 64]
    assert any(decision.shown and "resampled pos_embed" in decision.text for decision in made.decisions)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "has no config.json"),
        ("{", "not readable as JSON"),
        ({"model_type": "vit", "architectures": ["ViTForImageClassification"]}, "but a 'vit' of the transformers"),
        ({"architecture": "not_a_model"}, "has no model called 'not_a_model'"),
        ([1], "names no architecture"),
    ],
)
def test_a_folder_of_another_kind_is_one_message(tmp_path: Path, config: Any, message: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(UsageError, match=message):
        create_classifier(ModelSource(f"local-dir:{tmp_path}"))


def test_a_missing_folder_and_a_forgotten_prefix_are_one_message(tmp_path: Path) -> None:
    saved(tmp_path / "mine")
    assert "no folder 'nowhere'" in only_message(command(tmp_path, "check", "local-dir:nowhere"))
    assert "give local-dir:mine" in only_message(command(tmp_path, "check", "mine"))
    assert "give hf-hub:owner/model" in only_message(command(tmp_path, "check", "owner/model"))
    assert "must go on after hf-hub" in only_message(command(tmp_path, "check", "hf-hub:"))


def test_a_model_of_the_hub_comes_from_the_cache_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline(monkeypatch, tmp_path / "hub")
    model = saved(snapshot(tmp_path / "hub", "owner/model"))
    for name in ("hf-hub:owner/model", "hf_hub:owner/model", f"hf-hub:owner/model@{COMMIT}", "hf-hub:owner/model@main"):
        made = create_classifier(ModelSource(name))
        assert weights_digest(made.backbone) == weights_digest(model)
        assert {decision.about: decision.text for decision in made.decisions}["model"] == f"{name} at commit {COMMIT}"
    assert HeadProbe("hf-hub:owner/model").identity()["name"] == "hf-hub:owner/model"
    with pytest.raises(RunError, match=r"cannot be reached for 'hf-hub:owner/other', and its cache has no config.json"):
        located("hf-hub:owner/other", weights=True)
    with pytest.raises(RunError, match=r"cache has no config\.json"):
        located("hf-hub:owner/model@other", weights=True)
    with pytest.raises(UsageError, match="hf-hub:OWNER/MODEL"):
        located("hf-hub:a/b/c", weights=True)


HUB = """
import json, sys
from headprobe.backbone.weights import ModelSource, create_classifier
for name in json.load(sys.stdin):
    try:
        made = create_classifier(ModelSource(name))
        print(json.dumps([made.class_names[:1], [decision.text for decision in made.decisions]]))
    except Exception as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


def test_a_model_is_fetched_from_the_hub_at_one_commit_and_never_as_a_pickle(tmp_path: Path) -> None:
    saved(tmp_path / "safe")
    (tmp_path / "safe" / "modeling_custom.py").write_text("raise SystemExit('ran')")
    saved(tmp_path / "pickled", safe=False)
    (tmp_path / "data").mkdir()
    names = ["hf-hub:owner/set", f"hf-hub:owner/set@{SERVED}", "hf-hub:owner/pickled", "hf-hub:owner/data",
             "hf-hub:owner/none", "hf-hub:owner/set@none"]  # fmt: skip
    with running(tmp_path / "safe") as hub:
        hub.folders |= {"pickled": tmp_path / "pickled", "data": tmp_path / "data"}
        done = subprocess.run(
            [sys.executable, "-c", HUB], input=json.dumps(names), capture_output=True, text=True, timeout=300,
            env=environment(tmp_path / "home", hub.address), check=False,
        )  # fmt: skip
        asked = list(hub.requests)
    assert done.returncode == 0, done.stderr
    plain, pinned, pickled, data, none, revision = (json.loads(line) for line in done.stdout.splitlines())
    assert plain[0] == pinned[0] == ["class 0"]
    assert f"hf-hub:owner/set at commit {SERVED}" in plain[1]
    assert pickled[0] == "UsageError"
    assert "has no model.safetensors; a pickle such as pytorch_model.bin" in pickled[1]
    assert (data[0], none[0], revision[0]) == ("UsageError", "UsageError", "UsageError")
    assert "has no config.json" in data[1]
    assert not any(word in request for request in asked for word in (".bin", ".py"))


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("mean", None), ("mean", [0.5, "0.5", 0.5]), ("mean", [0.5, float("nan"), 0.5]), ("mean", 0.5),
        ("std", [0.5, -1, 0.5]), ("interpolation", "random"), ("interpolation", "foo"), ("crop_mode", "foo"),
        ("crop_pct", "0.9"), ("crop_pct", 0), ("crop_pct", 2.5), ("crop_pct", True), ("input_size", 32),
        ("input_size", [3, 32]), ("input_size", [3, 32.5, 32]), ("test_input_size", [3, 0, 32]), ("test_crop_pct", -1),
    ],
)  # fmt: skip
def test_what_images_depend_on_is_checked_wherever_it_stands(tmp_path: Path, entry: str, value: Any) -> None:
    saved(tmp_path / "mine")
    with pytest.raises(UsageError, match=rf"^{entry} in model.options.pretrained_cfg_overlay must be .*, got "):
        create_classifier(ModelSource("digits_vit", options={"pretrained_cfg_overlay": {entry: value}}))
    file = tmp_path / "mine" / "config.json"
    config = json.loads(file.read_text())
    config["pretrained_cfg"][entry] = value
    file.write_text(json.dumps(config))
    with pytest.raises(UsageError, match=rf"^{entry} of the config.json of 'local-dir:.* must be .*, got "):
        create_classifier(ModelSource(f"local-dir:{tmp_path / 'mine'}"))


@pytest.mark.parametrize(("entry", "value"), [("pretrained_cfg", None), ("model_args", [1]), ("num_classes", 7)])
def test_a_wrong_config_is_blamed(tmp_path: Path, entry: str, value: Any) -> None:
    saved(tmp_path / "mine")
    file = tmp_path / "mine" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), entry: value}))
    with pytest.raises(UsageError, match=r"config.json of 'local-dir:"):
        create_classifier(ModelSource(f"local-dir:{tmp_path / 'mine'}"))


def test_a_config_without_pretrained_cfg_is_blamed(tmp_path: Path) -> None:
    saved(tmp_path / "mine")
    file = tmp_path / "mine" / "config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "pretrained_cfg"}))
    with pytest.raises(UsageError, match=r"pretrained_cfg of the config.json"):
        create_classifier(ModelSource(f"local-dir:{tmp_path / 'mine'}"))


@pytest.mark.parametrize("names", [NAMES[:9], ["a"] * 10, [*NAMES, "one more"]])
def test_names_that_do_not_name_each_class_are_not_used_and_said(tmp_path: Path, names: list[str]) -> None:
    saved(tmp_path / "mine", names=names)
    made = create_classifier(ModelSource(f"local-dir:{tmp_path / 'mine'}"))
    assert made.class_names is None
    assert [one.shown for one in made.decisions if one.about == "names of classes"] == [True]


def test_the_file_of_weights_that_was_read_is_named(tmp_path: Path) -> None:
    saved(tmp_path / "mine")
    other = tmp_path / "other.safetensors"
    other.write_bytes((tmp_path / "mine" / "model.safetensors").read_bytes())
    made = create_classifier(ModelSource(f"local-dir:{tmp_path / 'mine'}", str(other)))
    assert made.decisions[0].text == "other.safetensors"


def test_another_image_size_by_the_overlay_is_not_dropped_without_a_word() -> None:
    overlay = {"input_size": [3, 64, 64]}
    with pytest.raises(UsageError, match=r"built for images of 32 x 32 pixels; use model.options.img_size"):
        create_classifier(ModelSource("digits_vit", options={"pretrained_cfg_overlay": overlay}))


def test_a_model_of_the_hub_needs_an_owner() -> None:
    with pytest.raises(UsageError, match=r"needs its owner: hf-hub:OWNER/MODEL"):
        located("hf-hub:nosuch", weights=False)
