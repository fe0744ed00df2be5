"""Training without some heads: from a mask, whose heads stay silent, and from a pruned directory, which stays one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import headprobe
from headprobe.backbone.weights import ModelSource, create_classifier
from headprobe.errors import UsageError
from headprobe.fit_steps import Fit
from tests.cli_runs import QUICK, Ended, command

BRIEF = ("--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false", "--data.num_workers", "0",
         "--trainer.accelerator", "cpu", "--trainer.limit_train_batches", "4")  # fmt: skip

SPEC = "layer:3+head:0.2"


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Train the bundled model a little under a mask."""
    return command(tmp_path_factory.mktemp("masked"), "fit", "--model.mask_spec", SPEC, *BRIEF)


def weights(ended: Ended) -> Path:
    return ended.directory() / "model.safetensors"


def test_masked_heads_write_nothing_in_the_weights_that_are_saved(masked: Ended) -> None:
    assert masked.code == 0, masked.err
    state, start = load_file(weights(masked)), create_classifier(ModelSource("digits_vit")).backbone.state_dict()
    assert state["blocks.3.attn.proj.weight"].abs().max() == 0
    assert state["blocks.0.attn.proj.weight"][:, 32:48].abs().max() == 0
    assert state["blocks.0.attn.proj.weight"][:, :32].abs().min() > 0
    assert not torch.equal(state["blocks.1.attn.qkv.weight"], start["blocks.1.attn.qkv.weight"])


def test_the_weights_say_under_which_mask_they_were_trained(masked: Ended) -> None:
    made = create_classifier(ModelSource("digits_vit", str(weights(masked))))
    said = {one.about: one for one in made.decisions}["masked heads"]
    assert (said.shown, SPEC in said.text) == (True, True)


def test_the_mask_changes_nothing_in_the_model_that_was_trained_under_it(masked: Ended) -> None:
    name = ("--model.name", "digits_vit", "--model.weights", str(weights(masked)))
    ended = command(masked.folder, "test", *name, "--mask-spec", SPEC, *QUICK)
    baseline, row = ended.rows(1)
    assert ended.code == 0, ended.err
    assert (row["top1"], row["nll"]) == (baseline["top1"], baseline["nll"])
    assert float(row["kl_nats"]) == 0


def test_training_goes_on_under_the_mask_of_the_weights(masked: Ended) -> None:
    fit = Fit("digits_vit", weights=str(weights(masked)))
    assert fit.masked is not None
    assert fit.masked.spec == SPEC
    assert Fit("digits_vit").masked is None


def test_masked_heads_get_no_gradient() -> None:
    fit = Fit("digits_vit", mask_spec=SPEC)
    fit.setup("fit")
    fit.backbone(torch.randn(4, 3, 32, 32)).square().sum().backward()
    fit.teardown("fit")
    attention: Any = fit.backbone.get_submodule("blocks.0.attn")
    rows = torch.cat([torch.arange(start + 32, start + 48) for start in (0, 64, 128)])  # head 2 in q, k and v
    gradient = attention.qkv.weight.grad
    assert gradient[rows].abs().max() == 0
    assert attention.proj.weight.grad[:, 32:48].abs().max() == 0
    others = [row for row in range(192) if row not in rows.tolist()]
    assert gradient[others].abs().max() > 0


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("each:layer", "must be one mask of one head or more"),
        ("none", "must be one mask of one head or more"),
        ("grow:calibration:gradient_abs:least:3", "must name heads without scoring any"),
        ("layer:9", "has no layer 9"),
    ],
)
def test_a_mask_that_cannot_be_trained_under_is_refused(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Fit("digits_vit", mask_spec=spec)


def test_a_pruned_directory_is_trained_and_stays_one(tmp_path: Path) -> None:
    made = command(tmp_path, "prune", "--mask-spec", SPEC, "--output", "small", "--pairs", "1", *QUICK)
    assert made.code == 0, made.err
    ended = command(tmp_path, "fit", "--model.name", "local-dir:small", *BRIEF)
    assert ended.code == 0, ended.err
    folder = tmp_path / "lightning_logs" / "version_1" / "pruned"
    assert f"Pruned model: {folder.relative_to(tmp_path)}" in ended.out
    before, after = headprobe.load_pruned(tmp_path / "small"), headprobe.load_pruned(folder)
    states = before.state_dict(), after.state_dict()
    assert {name: value.shape for name, value in states[0].items()} == {
        name: value.shape for name, value in states[1].items()
    }
    assert not any(torch.equal(value, states[1][name]) for name, value in states[0].items() if "qkv" in name)
    first, second = (json.loads((one / "config.json").read_text())["headprobe"] for one in (tmp_path / "small", folder))
    assert second["layers"] == first["layers"]
    assert second["fine_tuned"]["weights_sha256"] == first["weights_sha256"]
    assert "proof" not in second
    assert "the logits are no longer those of the mask" in (folder / "README.md").read_text()
    scored = command(tmp_path, "test", "--model.name", f"local-dir:{folder}", "--mask-spec", "layer:0", *QUICK)
    assert scored.code == 0, scored.err


def test_a_pruned_directory_trained_under_a_mask_is_saved_under_it(tmp_path: Path) -> None:
    made = command(tmp_path, "prune", "--mask-spec", "layer:3+head:0.2", "--output", "small", "--pairs", "1", *QUICK)
    assert made.code == 0, made.err
    ended = command(tmp_path, "fit", "--model.name", "local-dir:small", "--model.mask_spec", "head:1.0", *BRIEF)
    assert ended.code == 0, ended.err
    folder = tmp_path / "lightning_logs" / "version_1" / "pruned"
    assert load_file(folder / "model.safetensors")["blocks.1.attn.proj.weight"][:, :16].abs().max() == 0
    made_of = create_classifier(ModelSource(f"local-dir:{folder}"))
    said = {one.about: one.text for one in made_of.decisions}["pruned"]
    assert "trained under the mask head:1.0, whose heads write nothing" in said
    again = Fit(f"local-dir:{folder}")
    assert again.masked is not None
    assert again.masked.spec == "head:1.0"


def test_heads_of_an_earlier_mask_never_learn_again_by_another_one(masked: Ended) -> None:
    with pytest.raises(UsageError, match=r"must hold the heads that the weights were trained without, .* got layer:1"):
        Fit("digits_vit", weights=str(weights(masked)), mask_spec="layer:1")
    more = Fit("digits_vit", weights=str(weights(masked)), mask_spec=f"layer:1+{SPEC}")
    assert more.masked is not None
