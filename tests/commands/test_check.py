"""`check`: does a mask take effect on this model?"""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from headprobe.backbone.heads.sites import SITES
from tests.cli_runs import command, only_message

VIT = "timm.layers.attention.Attention"


def test_every_layer_has_a_row_with_its_heads_and_proofs(tmp_path: Path) -> None:
    ended = command(tmp_path, "check", "test_vit")
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert lines[0] == "test_vit (3 x 160 x 160): 6 layers, 12 heads"
    rows = [line.split() for line in lines if line.strip()[:1].isdigit()]
    assert [row[:6] for row in rows] == [[str(n), f"blocks.{n}.attn", "2", "32", "global", ".norm"] for n in range(6)]
    assert [row[6] for row in rows] == [f"blocks.{n}" for n in range(6)]
    assert {mark for row in rows for mark in row[7:]} == {"ok"}


def test_options_change_the_model_that_is_checked(tmp_path: Path) -> None:
    ended = command(tmp_path, "check", "test_vit", "--model.options", '{"img_size": 96, "depth": 2}')
    assert ended.out.splitlines()[0] == "test_vit (3 x 96 x 96): 2 layers, 4 heads"


def test_json_holds_every_layer_and_verdict(tmp_path: Path) -> None:
    ended = command(tmp_path, "check", "digits_swin", "--json")
    data = json.loads(ended.out)
    assert data["passed"] is True
    assert [layer["heads"] for layer in data["layers"]] == [2, 2, 4, 4, 8, 8]
    assert {layer["class"] for layer in data["layers"]} == {"timm.models.swin_transformer.WindowAttention"}
    assert all(proof["passed"] for layer in data["layers"] for proof in layer["proofs"].values())


def test_a_failed_proof_is_exit_code_1_and_names_layer_and_proof(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SITES, VIT, replace(SITES[VIT], interleaved=True))
    ended = command(tmp_path, "check", "test_vit")
    assert ended.code == 1
    assert "blocks.0.attn: operator: masking differs from zeroing the operator" in only_message(ended)
    assert "FAIL  blocks.5.attn: operator" in ended.out
    assert "this model must not be run under masks" in ended.out


def test_a_run_on_a_model_that_fails_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SITES, VIT, replace(SITES[VIT], interleaved=True))
    ended = command(
        tmp_path, "test", "--mask-spec", "layer:0", "--data.num_workers", "0", "--trainer.accelerator", "cpu"
    )
    assert ended.code == 2
    assert "is not zeroing them" in only_message(ended)


def test_the_meaning_of_a_mask_can_be_chosen(tmp_path: Path) -> None:
    words = ("check", "efficientformerv2_s0", "--model.semantics")
    slot, attention = (command(tmp_path, *words, choice).out for choice in ("slot", "attention"))
    assert "masked is the whole slot" in slot
    assert "masked is what the head attended to alone" in attention
    assert " operator " in attention.splitlines()[3]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: name"),
        (["resnet18"], "has no attention heads"),
        (["shvit_s1"], "a single head by design"),
        (["vit_tinny_patch16_224"], "did you mean"),
        (["test_vit", "--model.semantics", "both"], "semantics"),
    ],
)
def test_wrong_requests_are_one_message_and_code_2(tmp_path: Path, words: list[str], message: str) -> None:
    ended = command(tmp_path, "check", *words)
    assert ended.code == 2
    assert message in only_message(ended)
