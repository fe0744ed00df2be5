"""`masks`: which heads a spec stands for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from headprobe.backbone.heads.find import find_heads
from headprobe.backbone.preparation import data_config
from headprobe.backbone.weights import BUNDLED, ModelSource, create_backbone
from headprobe.commands.masks import BUNDLED_HEADS
from tests.cli_runs import command, only_message


def test_each_mask_is_shown_with_its_heads(tmp_path: Path) -> None:
    ended = command(tmp_path, "masks", "layer:1+head:3.1,3")
    assert ended.code == 0
    assert ended.out.splitlines() == [
        "digits_vit: 6 layers, 24 heads; layer:1+head:3.1,3 stands for 1 mask",
        "layer:1+head:3.1,3  6 heads: 1.0-3 3.1,3",
    ]


def test_a_mask_without_heads_is_shown_as_such(tmp_path: Path) -> None:
    assert "random:0:0  0 heads" in command(tmp_path, "masks", "random:0-4/4:0").out.splitlines()


def test_the_json_of_a_mask_is_a_mask_for_file(tmp_path: Path) -> None:
    (tmp_path / "mask.json").write_text(command(tmp_path, "masks", "index:2+head:0.1", "--json").out)
    again = command(tmp_path, "masks", "file:mask.json", "--json")
    (first,), (second,) = (json.loads(text).values() for text in ((tmp_path / "mask.json").read_text(), again.out))
    assert first["masked_heads"] == second["masked_heads"] == {"0": [1, 2], **{str(n): [2] for n in range(1, 6)}}


def test_models_are_built_without_weights_and_with_options(tmp_path: Path) -> None:
    name = "deit_tiny_patch16_224"  # its weights are on the hub, and tests have no network
    ended = command(tmp_path, "masks", "each:layer", "--model.name", name, "--model.options", '{"depth": 3}')
    assert ended.code == 0
    assert ended.out.startswith(f"{name}: 3 layers, 9 heads; each:layer stands for 3 masks")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["layer:12"], "digits_vit has no layer 12"),
        (["layer:3,"], "expected a layer number"),
        ([], "the following arguments are required: spec"),
        (["layer:3", "--modl.name", "x"], "did you mean --model.name"),
        (["layer:3", "--model.name", "resnet18"], "has no attention heads"),
    ],
)
def test_wrong_requests_are_one_message_and_code_2(tmp_path: Path, words: list[str], message: str) -> None:
    ended = command(tmp_path, "masks", *words)
    assert ended.code == 2
    assert message in only_message(ended)


@pytest.mark.parametrize("name", BUNDLED)
def test_the_bundled_models_have_the_heads_that_are_found_in_them(name: str) -> None:
    backbone = create_backbone(ModelSource(name, pretrained=False))
    found = find_heads(backbone, data_config(backbone)["input_size"], name)
    assert BUNDLED_HEADS[name] == found.heads_per_layer


def test_masks_of_a_bundled_model_need_no_torch() -> None:
    code = (
        "import sys; from headprobe.cli import main; sys.exit(main(['masks', 'all']) + 10 * ('torch' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


def test_a_wrong_spec_is_refused_before_torch_is_loaded() -> None:
    code = "import sys; from headprobe.cli import main; sys.exit(main(['masks', 'x']) + 10 * ('torch' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 2
