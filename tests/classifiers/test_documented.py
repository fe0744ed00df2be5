"""The commands of docs/own_model.md for models without a classifier, with random weights at small sizes.

What the page says of each model is compared with timm's own model, which is built without numbers.
"""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml

from tests.cli_runs import QUICK, command

PAGE = (Path(__file__).parents[2] / "docs" / "own_model.md").read_text(encoding="utf-8")
SECTION = PAGE.split("\n## Models without a classifier\n")[1].split("\n## ")[0]

COMMANDS = [
    shlex.split(found.replace("\\\n", " "))[3:]
    for found in re.findall(r"^python -m headprobe test (?:.*\\\n)*.*", SECTION, re.MULTILINE)
]
MODELS = [words[words.index("--model.name") + 1] for words in COMMANDS]
ROWS = {
    cells[0].strip("`"): cells
    for line in SECTION.splitlines()
    if line.startswith("| `vit_")
    for cells in [[cell.strip() for cell in line.strip("| ").split(" | ")]]
}

SMALL: dict[str, dict[str, Any]] = {name: {"img_size": 64, "depth": 2} for name in MODELS}
SMALL["vit_small_patch14_dinov2.lvd142m"] = {"img_size": 56, "depth": 2}


def test_each_of_the_five_kinds_has_a_command_and_a_row() -> None:
    kinds = ("_dinov2.", "_dinov3.", "_siglip_224.v2", "_clip_", ".mae")
    assert [next(kind for kind in kinds if kind in name) for name in MODELS] == list(kinds)
    assert list(ROWS) == MODELS


@pytest.mark.parametrize("name", MODELS)
def test_the_row_of_a_model_says_what_timm_builds(name: str) -> None:
    with torch.device("meta"):
        model: Any = timm.create_model(name)
    _, attention, layers, size, feature, _ = ROWS[name]
    assert attention == f"`{type(model.blocks[0].attn).__name__}`"
    pooling = getattr(model, "attn_pool", None)
    assert layers == f"{len(model.blocks)}{' + 1' if pooling is not None else ''} of {model.blocks[0].attn.num_heads}"
    assert int(size.split()[0]) == model.pretrained_cfg["input_size"][1]
    assert int(feature.split()[0]) == (model.num_classes or model.num_features)
    assert ("embedding" in feature) == bool(model.num_classes)
    assert {"token": "class token", "avg": "mean of the patches", "map": "attention pool"}[model.global_pool] in feature


@pytest.mark.parametrize("classifier", ["class-mean", "none"])
@pytest.mark.parametrize("words", COMMANDS, ids=MODELS)
def test_the_command_runs_with_random_weights_at_a_small_size(
    words: list[str], classifier: str, tmp_path: Path
) -> None:
    name = words[words.index("--model.name") + 1]
    given = dict(zip(words[1::2], words[2::2], strict=True))
    given |= {"--model.classifier": classifier, "--data.path": "digits", "--model.pretrained": "false"}
    given["--data.max_images"] = "60"  # of which each class has some in both halves
    given.pop("--model.options.img_size", None)
    options = yaml.safe_dump(SMALL[name], default_flow_style=True, width=200).strip()
    ended = command(
        tmp_path, words[0], *QUICK, *(part for pair in given.items() for part in pair), "--model.options", options
    )
    assert ended.code == 0, ended.err
    rows = ended.rows()
    heads = ROWS[name][2]
    assert len(rows) == 1 + 2 + ("+ 1" in heads)
    assert {int(row["heads_masked"]) for row in rows[1:]} == {int(heads.rpartition(" ")[2])}
    # layers of DINOv2 and DINOv3 begin at a scale of 1e-5
    assert all(float(row["feature_distance"]) > 0 for row in rows[1:])
    record = json.loads((ended.directory() / "run.json").read_text())
    assert record["model"]["features"] == int(ROWS[name][4].split()[0])
    assert ("embedding" in record["decisions"]) == ("embedding" in ROWS[name][4])
    if classifier == "none":
        assert record["model"]["classifier"] == "none"
        assert "top1_count" not in rows[0]
    else:
        assert record["classifier"]["kind"] == "class-mean"
        assert record["classifier"]["features"] == record["model"]["features"]
        assert 0 <= int(rows[0]["top1_count"]) <= int(rows[0]["images"])
