"""`masks`: which heads a spec stands for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from timm.models import save_for_hf

from headprobe.backbone.heads.find import find_heads
from headprobe.backbone.preparation import data_config
from headprobe.backbone.weights import BUNDLED, ModelSource, create_backbone
from headprobe.commands.masks import BUNDLED_HEADS, KEPT
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


TINY = ("--model.name", "deit_tiny_patch16_224", "--model.options", '{"depth": 2}')

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # an import fails
from headprobe.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_model_that_was_built_once_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "lightning_logs").mkdir()
    built = command(tmp_path, "masks", "each:layer", *TINY)

    words = [sys.executable, "-c", WITHOUT_TORCH, "masks", "each:layer", *TINY]
    again = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert again.stdout == built.out
    assert built.out.startswith("deit_tiny_patch16_224: 2 layers, 6 heads")


def test_heads_that_are_kept_are_those_of_the_same_options_and_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lightning_logs" / "proofs").mkdir(parents=True)
    command(tmp_path, "masks", "each:layer", *TINY)
    file = tmp_path / KEPT
    file.write_text(file.read_text().replace("3,", "5,"))  # whoever reads it says 8 heads
    assert "2 layers, 8 heads" in command(tmp_path, "masks", "each:layer", *TINY).out

    assert "3 layers, 9 heads" in command(tmp_path, "masks", "each:layer", *TINY[:-1], '{"depth": 3}').out
    for other in ("importlib.metadata.version", "headprobe.commands.masks.source_digest"):
        with monkeypatch.context() as patched:
            patched.setattr(other, lambda *_: "other")
            assert "2 layers, 6 heads" in command(tmp_path, "masks", "each:layer", *TINY).out


@pytest.mark.parametrize("content", ["{", "[1]", '{"a": 3}', '{"a": ["x"]}', '{"a": []}'])
def test_a_broken_file_of_heads_counts_as_none(tmp_path: Path, content: str) -> None:
    (tmp_path / KEPT).parent.mkdir(parents=True)
    (tmp_path / KEPT).write_text(content)
    assert "2 layers, 6 heads" in command(tmp_path, "masks", "each:layer", *TINY).out


def test_nothing_is_kept_where_headprobe_never_wrote(tmp_path: Path) -> None:
    command(tmp_path, "masks", "each:layer", *TINY)
    assert not any(tmp_path.iterdir())


def test_nothing_is_kept_of_a_folder_as_its_content_may_change(tmp_path: Path) -> None:
    (tmp_path / "lightning_logs").mkdir()
    for depth in (2, 3):
        model = timm.create_model("deit_tiny_patch16_224", depth=depth)
        save_for_hf(model, tmp_path / "own", model_args={"depth": depth}, safe_serialization=True)
        assert f"own: {depth} layers" in command(tmp_path, "masks", "each:layer", "--model.name", "local-dir:own").out
    assert not (tmp_path / KEPT).exists()
