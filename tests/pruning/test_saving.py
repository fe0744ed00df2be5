"""A pruned model on disk: what is loaded computes the same, and what was changed is refused with the reason."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import headprobe
from headprobe.backbone.heads.find import find_heads
from headprobe.backbone.masking.replacement import WITH_ZERO
from headprobe.backbone.pruned.directory import digest_of, refuse_existing, save_directory
from headprobe.backbone.sandbox import example_images
from headprobe.backbone.weights import ModelSource, create_classifier
from headprobe.errors import UsageError
from headprobe.masks.spec import MaskSpec, expand_all
from headprobe.pruning.load import load_pruned, save_pruned
from headprobe.pruning.remove import without_heads
from tests.cli_runs import QUICK, command
from tests.families import REPRESENTATIVES
from tests.pruning.test_remove import VARIED, built, drawn, keep_of

ABOUT = {
    "parent": {"name": "tiny", "weights_sha256": "0"},
    "mask": {"spec": "layer:1", "digest": "1"},
    "ablation": "zero",
}

NAMES = ("vit", "vit_registers", "vit_distilled", "swin", "eva", "dinov3", "beit", "beit, shared biases", "swin_v2",
         "rope_mixed", "vit, no biases")  # fmt: skip


def saved(folder: Path, name: str = "vit", mask: str = "different numbers", kind: str = "linear") -> nn.Module:
    """Prune a tiny model and save it."""
    model, layout = built(name)
    keep = keep_of(layout, mask)
    smaller = without_heads(model, layout, keep, drawn(layout, keep, kind)[0])
    known, changed = VARIED.get(name, (name, {}))
    small = REPRESENTATIVES[known]
    save_directory(smaller, folder, small.name, {**small.options, **changed}, ABOUT)
    return smaller


@pytest.mark.parametrize("mask", ["different numbers", "whole layer"])
@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_what_is_loaded_gives_the_same_logits_to_the_last_bit(tmp_path: Path, name: str, mask: str) -> None:
    smaller = saved(tmp_path / "small", name, mask)
    loaded = load_pruned(tmp_path / "small")
    size = REPRESENTATIVES[VARIED.get(name, (name, {}))[0]].input_size
    images = example_images(loaded, size, 2)
    assert torch.equal(loaded(images), smaller(images))
    assert not loaded.training
    assert sorted(file.name for file in (tmp_path / "small").iterdir()) == [
        "README.md", "config.json", "model.safetensors"
    ]  # fmt: skip


def test_a_loaded_model_has_the_interface_of_timm(tmp_path: Path) -> None:
    smaller: Any = saved(tmp_path / "small")
    loaded: Any = headprobe.load_pruned(tmp_path / "small")
    assert type(loaded) is type(smaller)
    assert loaded.get_classifier().out_features == loaded.num_classes == 7
    assert loaded.default_cfg["architecture"] == "vit_tiny_patch16_224"
    assert loaded.default_cfg["mean"] == list(smaller.default_cfg["mean"])
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        features = loaded.forward_features(images)
        assert torch.equal(loaded.forward_head(features), smaller(images))
    loaded.reset_classifier(3)
    assert loaded(images).shape == (2, 3)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_changed_byte_is_refused(tmp_path: Path, name: str) -> None:
    saved(tmp_path / "small")
    whole = (tmp_path / "small" / name).read_bytes()
    steps = max(len(whole) // 40, 1)
    for place in range(3, len(whole), steps):
        changed = bytearray(whole)
        changed[place] ^= 1
        (tmp_path / "small" / name).write_bytes(bytes(changed))
        with pytest.raises(
            UsageError,
            match=r"was changed|not readable as JSON|is not the file that was|are not those of",
        ):
            load_pruned(tmp_path / "small")
    (tmp_path / "small" / name).write_bytes(whole)
    load_pruned(tmp_path / "small")


def test_weights_of_another_model_are_refused_with_the_reason(tmp_path: Path) -> None:
    saved(tmp_path / "small")
    saved(tmp_path / "other", kind="zero")
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path / "small")
    with pytest.raises(UsageError, match=r"model.safetensors is not the file that was written with the config.json"):
        load_pruned(tmp_path / "small")
    state = load_file(tmp_path / "other" / "model.safetensors")
    state["head.bias"] = state["head.bias"][:3].clone()
    save_file(state, tmp_path / "odd.safetensors")
    with pytest.raises(UsageError, match=r"the weights in .*odd.safetensors' are not those of .* 1 of another shape"):
        create_classifier(ModelSource(f"local-dir:{tmp_path / 'other'}", str(tmp_path / "odd.safetensors")))


def rewritten(folder: Path, **entries: Any) -> None:
    """Change entries of a configuration as another release would write it, its digest included."""
    config = json.loads((folder / "config.json").read_text())
    config["headprobe"] |= entries
    config["headprobe"]["config_sha256"] = digest_of(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"schema": 2}, r"has schema 2, and this headprobe reads 1: a newer release wrote it, so update headprobe"),
        ({"schema": None}, r"has schema None"),
        ({"layers": {"blocks.9.attn": {"heads": 4, "kept": [0], "bias": True}}}, r"'blocks.9.attn' with 4 .*no such"),
        ({"layers": {"blocks.0.attn": {"heads": 5, "kept": [0], "bias": True}}}, r"'blocks.0.attn' with 5 .*got 4"),
        ({"layers": {"blocks.0.attn": {"heads": 4, "kept": [2, 0], "bias": True}}}, r'must be \{"heads": 4'),
        ({"layers": {"blocks.0.attn": {"heads": 4, "kept": [4], "bias": True}}}, r'must be \{"heads": 4'),
        ({"layers": {"blocks.0.attn": {"heads": 4}}}, r'must be \{"heads": 4'),
        ({"layers": []}, r"must be an object"),
    ],
)  # fmt: skip
def test_a_configuration_that_says_something_else_is_refused(tmp_path: Path, entries: Any, message: str) -> None:
    saved(tmp_path / "small")
    rewritten(tmp_path / "small", **entries)
    with pytest.raises(UsageError, match=message):
        load_pruned(tmp_path / "small")


def test_a_model_with_all_heads_is_no_pruned_one(tmp_path: Path) -> None:
    timm.models.save_for_hf(timm.create_model("test_vit"), str(tmp_path / "plain"), safe_serialization=True)
    with pytest.raises(UsageError, match=r"takes a folder that headprobe prune wrote"):
        load_pruned(tmp_path / "plain")


def test_nothing_is_replaced_and_options_must_be_json(tmp_path: Path) -> None:
    smaller = saved(tmp_path / "small")
    with pytest.raises(UsageError, match=r"must not exist yet"):
        save_directory(smaller, tmp_path / "small", "test_vit", {}, ABOUT)
    with pytest.raises(UsageError, match=r"options are JSON values"):
        save_directory(smaller, tmp_path / "new", "test_vit", {"norm_layer": nn.LayerNorm}, ABOUT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.inference_mode()
def test_a_model_of_another_type_is_loaded_with_the_same_numbers(tmp_path: Path, dtype: torch.dtype) -> None:
    model, layout = built("vit")
    smaller = without_heads(model, layout, keep_of(layout, "random"), WITH_ZERO).to(dtype)
    save_pruned(smaller, tmp_path / "small", REPRESENTATIVES["vit"].options)
    images = torch.randn(2, *layout.input_size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(load_pruned(tmp_path / "small")(images), smaller.float()(images))


def test_a_folder_that_was_not_checked_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    model, layout = built("vit")
    smaller = without_heads(model, layout, keep_of(layout, "random"), WITH_ZERO)
    monkeypatch.setattr("headprobe.pruning.load.load_pruned", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_pruned(smaller, tmp_path / "small", REPRESENTATIVES["vit"].options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"about": {"data": Path("x")}}, r"about must be JSON values"),
        ({"about": {"schema": 9}}, r"must leave .* to headprobe, got 'schema'"),
        ({"about": "text"}, r"about must be JSON values"),
        ({"about": {"mask": "text"}}, r"about\['mask'\] must be an object with spec, digest, .* got 'text'"),
        (
            {"about": {"parent": {"pruned": {"ablation": 3}}}},
            r"about\['parent'\]\['pruned'\]\['ablation'\] must be text",
        ),
        ({"files": {"../escaped.txt": "x"}}, r"must have a plain name.* got '../escaped.txt'"),
        ({"files": {"config.json": "{}"}}, r"must have a plain name.* got 'config.json'"),
    ],
)
def test_what_would_replace_the_folders_own_is_refused(tmp_path: Path, arguments: Any, message: str) -> None:
    model, layout = built("vit")
    smaller = without_heads(model, layout, keep_of(layout, "random"), WITH_ZERO)
    with pytest.raises(UsageError, match=message):
        save_pruned(smaller, tmp_path / "small", REPRESENTATIVES["vit"].options, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_entries_with_numbers_for_names_are_read_again(tmp_path: Path) -> None:
    model, layout = built("vit")
    smaller = without_heads(model, layout, keep_of(layout, "random"), WITH_ZERO)
    save_pruned(smaller, tmp_path / "small", REPRESENTATIVES["vit"].options, {"trials": {2: 0.5, 10: 0.25}})
    written = json.loads((tmp_path / "small" / "config.json").read_text())["headprobe"]
    assert written["trials"] == {"2": 0.5, "10": 0.25}


def test_a_model_in_a_wrapper_is_refused_with_the_remedy(tmp_path: Path) -> None:
    model, layout = built("vit")
    wrapped = headprobe.remove_heads(nn.DataParallel(model), "head:0.1", input_size=layout.input_size)
    with pytest.raises(UsageError, match=r"give model.module to remove_heads, got a DataParallel"):
        save_pruned(wrapped, tmp_path / "small")


@pytest.mark.parametrize("name", ["link", "x" * 300, "a\0b", "file/small"])
def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_computed(tmp_path: Path, name: str) -> None:
    os.symlink(tmp_path / "nowhere", tmp_path / "link")
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UsageError, match=r"the new folder (must not exist yet|cannot have this name)"):
        refuse_existing(tmp_path / name)
    refuse_existing(tmp_path / "new" / "small")


def test_timm_itself_never_loads_it_as_something_else(tmp_path: Path) -> None:
    saved(tmp_path / "small")
    with pytest.raises(RuntimeError, match="size mismatch"):
        timm.create_model(f"local-dir:{tmp_path / 'small'}", pretrained=True)


def test_every_command_takes_a_pruned_folder(tmp_path: Path) -> None:
    saved(tmp_path / "small", "swin", "whole layer")
    name = "local-dir:small"
    checked = command(tmp_path, "check", name)
    assert (checked.code, "every proof passed" in checked.out) == (0, True), checked.err
    assert "3 layers, 10 heads" in command(tmp_path, "masks", "layer:1", "--model.name", name).out
    assert command(tmp_path, "check", name, "--model.pretrained", "true").code == 0


@pytest.mark.usefixtures("no_pictures")
def test_a_pruned_model_is_scored_described_and_masked_as_any_other(tmp_path: Path) -> None:
    digits_without(tmp_path / "small", "layer:1+head:0.2+head:3.1")
    words = ("--model.name", "local-dir:small", "--mask-spec", "layer:2+head:0.2", *QUICK)
    described = ("--trainer.callbacks", "[HeadAttention,HeadSimilarity,HeadSpectrum]")
    ended = command(tmp_path, "test", *words, *described)
    assert ended.code == 0, ended.err
    record = json.loads((ended.directory() / "run.json").read_text())
    assert record["model"]["heads_per_layer"] == [3, 4, 3, 4, 4]
    assert record["model"]["layers"] == [f"blocks.{number}.attn" for number in (0, 2, 3, 4, 5)]
    assert "6 heads of 12 removed in 3 layers before" in record["decisions"]["pruned"]
    # of layer 0 heads 0, 1 and 3 are left, so its head 2 is the architecture's head 3; layer 2 is blocks.3
    whole = command(tmp_path, "test", "--mask-spec", "head:0.2-3+layer:1+layer:3", *QUICK)
    found, expected = ended.rows()[1], whole.rows(1)[1]
    assert found["top1"] == expected["top1"]
    assert float(found["nll"]) == pytest.approx(float(expected["nll"]), rel=1e-5)


def digits_without(folder: Path, spec: str) -> None:
    """Prune the bundled ViT by zero and save it."""
    made = create_classifier(ModelSource("digits_vit"))
    layout = find_heads(made.backbone, (3, 32, 32), "digits_vit")
    keep = expand_all([MaskSpec(spec)], layout.heads_per_layer, "")[0].mask.mask.keep()
    smaller = without_heads(made.backbone, layout, keep, WITH_ZERO)
    save_directory(smaller, folder, "vit_tiny_patch16_224", made.options, ABOUT)
