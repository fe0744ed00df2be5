"""Every plain ViT without a classifier is among those that are tried; one of each timm family runs."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from benchmarks import without_classifier
from benchmarks.without_classifier import PLAIN, attempt, judge, names
from headprobe.catalog.survey import family_of_names
from headprobe.errors import UsageError

SMALLEST = {
    "vision_transformer": "vit_small_patch14_dinov2.lvd142m",
    "eva": "vit_small_patch16_dinov3.lvd1689m",
    "naflexvit": "naflexvit_base_patch16_siglip.v2_webli",
    "vision_transformer_hybrid": "vit_base_r50_s16_224.orig_in21k",
    "vision_transformer_sam": "samvit_base_patch16.sa1b",
    "deepseek_vit": "deepseek_vit_412m.deepseek_v4_1_flash",
    "gemma4_vit": "gemma4_vit_167m.gemma4_e4b_it",
    "qwen3_vit": "qwen3_vit_88m.qwen3_5_0_8b",
}
"""One name of each timm family."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_every_checkpoint_without_classes_is_tried_or_stands_behind_one_that_is() -> None:
    tried, families = names(), family_of_names()
    there = {(name.partition(".")[0], timm.get_pretrained_cfg(name).num_classes) for name in tried}
    assert len(there) == len(tried)
    plain = [name for name in timm.list_models(pretrained=True) if families[name.partition(".")[0]] in PLAIN]
    without = [name for name in plain if not timm.get_pretrained_cfg(name).num_classes]
    assert {(name.partition(".")[0], 0) for name in without} == {one for one in there if not one[1]}
    embeddings = {name for name in tried if timm.get_pretrained_cfg(name).num_classes}
    assert all(re.search("clip|pe_core", name) for name in embeddings)
    assert not any("_ft_in" in name for name in embeddings)
    assert sum(tried.values()) > len(without) > 150


@pytest.mark.parametrize("family", sorted(SMALLEST))
def test_one_name_of_each_family_is_judged_by_its_feature(family: str) -> None:
    name = SMALLEST[family]
    assert name in names()
    assert family_of_names()[name.partition(".")[0]] == family
    found = attempt((name, 1))
    assert (found.why, found.family) == ("", family)
    assert found.blocks == "2"
    with torch.device("meta"):
        model: Any = timm.create_model(name)
    assert found.features == (model.head_hidden_size if hasattr(model, "head_hidden_size") else model.num_features)
    assert len(found.distances) in (2, 3)  # with a pool of attention
    assert min(found.distances) > 0


def test_the_families_are_all_that_have_such_names() -> None:
    assert set(SMALLEST) == {family_of_names()[name.partition(".")[0]] for name in names()} <= set(PLAIN)


def test_a_model_that_two_blocks_do_not_fit_is_run_whole_or_named() -> None:
    small = attempt(("vit_base_patch16_sapiens2.fb", 1), largest=100)
    assert small.why.endswith("at most 100 million parameters are run, got 114")
    with pytest.raises(UsageError, match="at most 1 million parameters are run, got 4"):
        judge("vit_small_patch14_dinov2.lvd142m", {"img_size": 56, "depth": 2}, largest=1)


def test_the_table_counts_what_ran_and_names_what_did_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {"vit_small_patch14_dinov2.lvd142m": 1, "vit_base_patch14_dinov2.lvd142m": 2}
    monkeypatch.setattr(without_classifier, "names", lambda: chosen)
    file = tmp_path / "found.json"
    assert without_classifier.main(["*dinov2*", "--largest", "10", "--json", str(file)]) == 1
    printed, found = capsys.readouterr().out, json.loads(file.read_text())
    assert "| vision_transformer | 2 | 3 | 1 | 0 | 0 | 384 |" in printed
    assert "- `vit_base_patch14_dinov2.lvd142m`: 2 blocks: at most 10 million parameters are run, got 15" in printed
    assert (found["names"], found["checkpoints"], found["run"]) == (2, 3, 1)
    assert [case["features"] for case in found["cases"]] == [384, 0]
