"""A broken adapter must not get past `check`: things are broken one at a time, and the proof that fails is named."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from torch import Tensor, nn

from headprobe.backbone import ablation, bench, check, growing, joins, seen_attention
from headprobe.backbone.check import PROOFS, CheckReport, Verdict, check_backbone, prove_masks
from headprobe.backbone.form import HeadChannels
from headprobe.backbone.heads import HeadLayout, find_heads
from headprobe.backbone.layer_record import FusedAttention, PlainAttention
from headprobe.backbone.sites import SITES
from headprobe.errors import RunError, UsageError
from tests.families import ATTENTION, ATTENTION_2D, COAT, EVA, MVIT, REPRESENTATIVES, ROPE, build

NEST = "timm.models.nest.Attention"
SAM = "timm.models.vision_transformer_sam.Attention"
SIZE = (3, 32, 32)

NO_COLUMNS = {
    "vit_scale_norm": "a norm over all heads stands before the projection",
    "eva_scale_norm": "a norm over all heads stands before the projection",
    "botnet": "the projection is in the block around, behind a norm and an activation",
    "halonet": "the projection is in the block around, behind a norm and an activation",
    "lambda_resnet": "the projection is in the block around, behind a norm and an activation",
    "lambda_resnet_table": "the projection is in the block around, behind a norm and an activation",
    "lowformer": "there is no projection",  # nn.Identity: an upsampling convolution follows
    "cpubone": "there is no projection",
}
NO_MAP = ("coat", "coat_lite", "efficientvit_mit", "efficientvit_mit_large", "lambda_resnet", "lambda_resnet_table")


def checked(key: str, model: Any = None, **options: Any) -> CheckReport:
    representative = REPRESENTATIVES[key]
    return check_backbone(build(key) if model is None else model, representative.input_size, key, **options)


def failed(report: CheckReport) -> dict[str, list[int]]:
    """Numbers of the layers at which each proof fails."""
    found = {
        proof: [number for number, one in enumerate(report.layers) if one.proofs[proof].passed is False]
        for proof in PROOFS
    }
    return {proof: layers for proof, layers in found.items() if layers}


def proven(key: str) -> None:
    """Run the cheap proofs."""
    model = build(key)
    prove_masks(model, find_heads(model, REPRESENTATIVES[key].input_size, key))


def broken_site(monkeypatch: pytest.MonkeyPatch, path: str, **changes: Any) -> None:
    monkeypatch.setitem(SITES, path, replace(SITES[path], **changes))


# -- nothing is broken -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", REPRESENTATIVES)
def test_every_representative_passes_every_proof(key: str) -> None:
    report = checked(key)
    assert report.failures == []
    assert report.passed
    assert tuple(one.layer.heads for one in report.layers) == REPRESENTATIVES[key].heads
    assert {one.layer.attention_class for one in report.layers} == set(REPRESENTATIVES[key].classes)
    for one in report.layers:
        assert tuple(one.proofs) == PROOFS
        assert one.layer.known
        assert one.join is not None
        assert one.silent == []
        assert one.proofs["columns"] == Verdict(None, NO_COLUMNS[key]) or key not in NO_COLUMNS
        assert one.proofs["map"].passed is (None if key in NO_MAP else True)
        inapplicable = {proof for proof, verdict in one.proofs.items() if verdict.passed is None}
        assert inapplicable == {"columns"} * (key in NO_COLUMNS) | {"map"} * (key in NO_MAP)
