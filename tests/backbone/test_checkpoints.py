"""The weights in checkpoints of training programs, found without running any code."""

import argparse
import contextlib
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from headprobe.backbone.checkpoints import find_weights, read_checkpoint
from headprobe.backbone.places import unreadable
from headprobe.errors import UsageError


def weights(shift: float = 0.0) -> dict[str, Tensor]:
    return {"cls_token": torch.zeros(1, 1, 4) + shift, "blocks.0.attn.qkv.weight": torch.ones(12, 4) + shift,
            "norm.weight": torch.ones(4) + shift, "head.weight": torch.ones(3, 4) + shift}  # fmt: skip


def prefixed(prefix: str, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in (weights() if state is None else state).items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "checkpoint",
    [
        weights(),
        {"state_dict": weights(), "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}},
        {"model": weights(), "args": argparse.Namespace(model="deit_tiny")},
        {"model": {"state_dict": weights()}},
        {"model_state_dict": prefixed("module.")},
        {"state_dict": prefixed("_orig_mod.")},
        {"state_dict": prefixed("module._orig_mod.")},
        {"state_dict": prefixed("_orig_mod.module.")},
        {"state_dict": prefixed("model."), "pytorch-lightning_version": "2.6.0", "hyper_parameters": {"lr": 0.1}},
        {"state_dict": prefixed("model._orig_mod.") | {"criterion.weight": torch.ones(3)}},
        prefixed("timm_model."),
        prefixed("module.model.timm_model."),
        {"n_averaged": torch.tensor(3), **prefixed("module.")},
        {"net": prefixed("backbone."), "scheduler": {"last_epoch": 1}},
        {"blocks.0._orig_mod.attn.qkv.weight": weights()["blocks.0.attn.qkv.weight"]}
        | {name: tensor for name, tensor in weights().items() if "blocks" not in name},
    ],
)
def test_the_weights_are_found_and_have_the_models_names(checkpoint: dict[str, Any]) -> None:
    assert same(find_weights(checkpoint).tensors, weights())


@pytest.mark.parametrize("averaged", ["state_dict_ema", "model_ema"])
def test_the_moving_average_is_taken_and_said(averaged: str) -> None:
    checkpoint = {"state_dict": weights(), averaged: prefixed("module.", weights(shift=1.0))}
    chosen = find_weights(checkpoint)
    assert same(chosen.tensors, weights(shift=1.0))
    assert any(averaged in line and "--no-ema" in line for line in chosen.lines)
    plain = find_weights(checkpoint, ema=False)
    assert same(plain.tensors, weights())
    assert any(averaged in line for line in plain.lines)


def test_which_of_several_must_be_said() -> None:
    checkpoint = {"student": weights(), "teacher": prefixed("backbone.", weights(shift=1.0)), "epoch": 1}
    with pytest.raises(UsageError, match=r"several sets of weights \(student, teacher\); choose one with --key"):
        find_weights(checkpoint)
    assert same(find_weights(checkpoint, key="teacher").tensors, weights(shift=1.0))
    with pytest.raises(UsageError, match="--key must name"):
        find_weights(checkpoint, key="pupil")


def test_a_prefix_may_be_given_where_none_is_in_the_majority() -> None:
    both = prefixed("one.") | prefixed("two.", weights(shift=1.0))
    assert same(find_weights(both, prefix="two.").tensors, weights(shift=1.0))
    with pytest.raises(UsageError, match=r"begins with 'three.'; they begin with one. \(4\), two. \(4\)"):
        find_weights(both, prefix="three.")


def test_what_is_left_out_is_said() -> None:
    found = find_weights({"state_dict": prefixed("model.") | {"loss.weight": torch.ones(2)} | {"model.version": 3}})
    assert same(found.tensors, weights())
    assert "left out: model.version (no tensors)" in found.lines
    assert "left out: loss.weight (without the prefix 'model.')" in found.lines


def test_half_precision_stays_and_is_said() -> None:
    found = find_weights({name: tensor.bfloat16() for name, tensor in weights().items()})
    assert {tensor.dtype for tensor in found.tensors.values()} == {torch.bfloat16}
    assert "types: 4 bfloat16" in found.lines


def test_tensors_that_share_memory_get_their_own() -> None:
    shared = torch.ones(3, 4)
    found = find_weights({"a.weight": shared, "b.weight": shared, "c.weight": shared[:1]}).tensors
    assert len({tensor.untyped_storage().data_ptr() for tensor in found.values()}) == 3
    assert found["c.weight"].untyped_storage().nbytes() == 16


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3}, "holds no weights; its entries are epoch"),
        ([1, 2], "must hold a dictionary of weights, got list"),
        (nn.Linear(2, 2), "holds a whole model"),
        ({"state_dict_ema": {}}, "holds no weights"),
        ({"a.weight": torch.ones(2, 2).to_sparse()}, "sparse and quantised"),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UsageError, match=message):
        find_weights(read_checkpoint(tmp_path / "a.pth")[0])


class Danger:
    """Unpickled, it calls a function with one argument."""

    def __init__(self, function: Callable[..., Any], argument: Path) -> None:
        self.call = function, (str(argument),)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("extra", [np.float64(0.7), Path("runs/1"), argparse.Namespace(out=Path("x"), best=np.ones(2))])
def test_objects_beside_the_weights_do_not_stand_in_the_way(tmp_path: Path, extra: Any) -> None:
    torch.save({"state_dict": weights(), "extra": extra}, tmp_path / "a.ckpt")
    checkpoint, replaced = read_checkpoint(tmp_path / "a.ckpt")
    assert same(find_weights(checkpoint).tensors, weights())
    assert replaced


@pytest.mark.parametrize("function", [os.mkdir, shutil.rmtree, os.system, eval])
def test_functions_in_a_checkpoint_are_not_called(tmp_path: Path, function: Callable[..., Any]) -> None:
    target = tmp_path / "target"
    if function is shutil.rmtree:
        target.mkdir()
    torch.save({"state_dict": weights(), "extra": Danger(function, target)}, tmp_path / "a.ckpt")
    with contextlib.suppress(UsageError):  # some are refused by name, the others are placeholders
        read_checkpoint(tmp_path / "a.ckpt")
    assert target.exists() == (function is shutil.rmtree)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 cut off"])
def test_a_broken_file_is_one_message(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(UsageError, match="not a checkpoint that can be read without running code"):
        read_checkpoint(tmp_path / "a.pth")


def test_an_old_format_and_a_script_are_read_or_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": weights()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same(find_weights(read_checkpoint(tmp_path / "old.pth")[0]).tensors, weights())
    torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(str(tmp_path / "script.pt"))
    with pytest.raises(UsageError, match="TorchScript archive"):
        read_checkpoint(tmp_path / "script.pt")


def test_a_folder_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UsageError, match=r"must be one file; the folder .* has pytorch_model.bin"):
        read_checkpoint(tmp_path)
    with pytest.raises(UsageError, match="does not exist"):
        read_checkpoint(tmp_path / "none.pth")


def test_no_model_of_timms_has_names_that_look_wrapped() -> None:
    from headprobe.backbone.checkpoints import inside_of, wrapper_of

    for name in ("test_vit", "swin_tiny_patch4_window7_224", "mobilevit_xxs", "edgenext_xx_small", "tiny_vit_5m_224"):
        with torch.device("meta"):
            state = timm.create_model(name).state_dict()
        assert (wrapper_of(state), inside_of(state)) == ("", "")


def _refused(path: Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UsageError) as error:
            read_checkpoint(path)
    return str(error.value)


def test_files_of_other_programs_are_refused_without_raw_warnings(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 2)
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(layer.state_dict(), protocol=4))
    assert "not a checkpoint" in _refused(tmp_path / "plain.pkl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(layer, torch.zeros(1, 2)), tmp_path / "script.pt")
    assert "is a TorchScript archive" in _refused(tmp_path / "script.pt")


def test_a_moving_average_alone_is_called_one() -> None:
    found = find_weights({"ema": {"module": {"a.weight": torch.zeros(2)}}})
    assert found.lines[0] == "weights: ema.module, a moving average; there are no others"


def test_weights_deeper_inside_are_named_by_their_key() -> None:
    with pytest.raises(UsageError, match=r"--key a\.b\.c$"):
        find_weights({"n": 1, "a": {"b": {"c": {"d.weight": torch.zeros(2)}}}})


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_a_broken_download_is_called_incomplete(tmp_path: Path, share: float) -> None:
    file = tmp_path / "model.safetensors"
    save_file({f"{number}.weight": torch.zeros(100) for number in range(20)}, file)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    assert "is incomplete" in _refused(file)
    assert "is incomplete" in str(unreadable(file, OSError()))


def test_a_folder_of_timm_is_given_by_its_name(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).touch()
    assert f"--model.name local-dir:{tmp_path}" in _refused(tmp_path)
