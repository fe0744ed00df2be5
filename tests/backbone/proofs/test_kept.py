"""What was proven of a model is proven once: only the very same model, on such a device, takes it over."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from timm.layers import set_fused_attn
from torch import nn

from headprobe.backbone.proofs import kept
from headprobe.backbone.proofs.kept import KeptProofs
from headprobe.callbacks import identity
from headprobe.callbacks.identity import kept_proofs
from headprobe.module import HeadProbe
from tests.cli_runs import Ended, command
from tests.forked import run

SWEEP = ("test", "--mask-spec", "each:layer", "--data.num_workers", "0", "--trainer.accelerator", "cpu")


def trainer(folder: Path, precision: str = "32-true", device: str = "cpu") -> Any:
    strategy = SimpleNamespace(root_device=torch.device(device))
    return SimpleNamespace(default_root_dir=str(folder), precision=precision, strategy=strategy)


def probed(spec: str = "each:layer", **options: Any) -> HeadProbe:
    torch.set_num_threads(1)
    probe = HeadProbe(**options)
    probe.choose_masks(spec)
    return probe


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images of every forward pass of a ViT."""
    sizes: list[int] = []
    kind: Any = type(HeadProbe().backbone)
    forward = kind.forward

    def note(self: Any, images: torch.Tensor) -> Any:
        sizes.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(kind, "forward", note)
    return sizes


@pytest.fixture
def file(tmp_path: Path) -> KeptProofs:
    """The file of the bundled model, proven for masks of each layer."""
    probe = probed()
    found = kept_proofs(trainer(tmp_path), probe)
    assert found.read() is None
    probe.plan_passes(8)
    assert probe.proven is not None
    found.write(probe.proven)
    return found


def test_the_same_model_runs_the_proofs_of_its_masks_and_no_other_pass(file: KeptProofs, passes: list[int]) -> None:
    probe = probed()
    new = len(passes)  # one for the heads
    probe.known = file.read()
    probe.plan_passes(8)
    assert passes[new:] == [2, 2, 2, 2]  # plain, a mask of no head, of half of the heads, and plain again
    first = probed()
    first.plan_passes(8)
    assert probe.passes is not None
    assert first.passes is not None
    assert probe.passes.proven == first.passes.proven
    assert probe.passes.proven[1].pooled is not None
    assert probe.outputs == first.outputs
    assert probe.proven is None


def test_masks_of_other_layers_prove_their_own_joins_and_both_are_kept(file: KeptProofs, passes: list[int]) -> None:
    probe = probed("layer:3")
    probe.known = file.read()
    del passes[:]
    probe.plan_passes(8)
    assert len(passes) > 4
    assert probe.proven is not None
    file.write(probe.proven)
    found = file.read()
    assert found is not None
    assert [*found.passes] == [(0, 1, 2, 3, 4, 5), (3,)]


def _other_weights(probe: HeadProbe, _: pytest.MonkeyPatch) -> None:
    probe.backbone.get_parameter("blocks.2.mlp.fc1.bias").data[3] += 1e-3


def _other_module(probe: HeadProbe, _: pytest.MonkeyPatch) -> None:
    probe.backbone.get_submodule("blocks.2.mlp").act = nn.ReLU()


def _other_setting(probe: HeadProbe, _: pytest.MonkeyPatch) -> None:
    norm: Any = probe.backbone.get_submodule("blocks.2.norm1")
    norm.eps = 1e-3


def _other_size(probe: HeadProbe, _: pytest.MonkeyPatch) -> None:
    probe.data_config = {**probe.data_config, "input_size": (3, 64, 64)}


def _other_semantics(probe: HeadProbe, _: pytest.MonkeyPatch) -> None:
    probe.semantics = "attention"


def _without_classifier(probe: HeadProbe, _: pytest.MonkeyPatch) -> None:
    probe.classifier = "none"


def _other_version(package: str) -> Callable[[HeadProbe, pytest.MonkeyPatch], None]:
    def change(_: HeadProbe, patch: pytest.MonkeyPatch) -> None:
        versions = identity.versions() | {package: "another"}
        patch.setattr(identity, "versions", lambda: versions)

    return change


def _without_fused_attention(_: HeadProbe, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(identity, "arithmetic", lambda: {"fused_attention": False})


CHANGES = {
    "weights": _other_weights,
    "module": _other_module,
    "setting": _other_setting,
    "size": _other_size,
    "semantics": _other_semantics,
    "classifier": _without_classifier,
    "torch": _other_version("torch"),
    "timm": _other_version("timm"),
    "headprobe's source": _other_version("headprobe_source"),
    "arithmetic": _without_fused_attention,
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_any_part_of_the_key_proves_anew(
    name: str, file: KeptProofs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = probed()
    assert kept_proofs(trainer(tmp_path), probe).read() is not None
    CHANGES[name](probe, monkeypatch)
    assert kept_proofs(trainer(tmp_path), probe).read() is None


def test_another_precision_or_device_proves_anew(file: KeptProofs, tmp_path: Path) -> None:
    assert kept_proofs(trainer(tmp_path, precision="bf16-mixed"), probed()).read() is None
    assert kept_proofs(trainer(tmp_path, device="meta"), probed()).read() is None


def test_the_real_settings_of_torch_and_timm_are_in_the_key(file: KeptProofs, tmp_path: Path) -> None:
    set_fused_attn(False)
    try:
        assert kept_proofs(trainer(tmp_path), probed()).read() is None
    finally:
        set_fused_attn(True)


def _cut(text: str) -> str:
    return text[: len(text) // 2]


def _empty(_: str) -> str:
    return ""


def _no_object(_: str) -> str:
    return "[1, 2]"


def _another_join(text: str) -> str:
    return text.replace('"module": "blocks.1"', '"module": "blocks.2"', 1)


def _another_key(text: str) -> str:
    content = json.loads(text)
    content["key"]["versions"]["timm"] = "0.0"
    return json.dumps(content)


def _no_such_module(text: str) -> str:
    content = json.loads(text)
    content["proven"]["passes"][0]["joins"][0]["module"] = "blocks.77"
    content["sha256"] = kept._digest(content["proven"])
    return json.dumps(content)


def _an_unknown_field(text: str) -> str:
    content = json.loads(text)
    content["proven"]["passes"][0]["joins"][0]["colour"] = "red"
    content["sha256"] = kept._digest(content["proven"])
    return json.dumps(content)


@pytest.mark.parametrize(
    "change", [_cut, _empty, _no_object, _another_join, _another_key, _no_such_module, _an_unknown_field]
)
def test_a_broken_or_foreign_file_proves_anew_and_is_replaced(file: KeptProofs, change: Callable[[str], str]) -> None:
    before = file.file.read_text()
    broken = change(before)
    assert broken != before
    file.file.write_text(broken)
    assert file.read() is None
    probe = probed()
    probe.plan_passes(8)
    assert probe.proven is not None
    file.write(probe.proven)
    assert file.file.read_text() == before


class OwnMlp(nn.Module):
    """Code that no version names."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> Any:
        return self.inner(x)


def test_nothing_is_kept_of_classes_whose_code_is_in_no_version(tmp_path: Path) -> None:
    probe = probed()
    block: Any = probe.backbone.get_submodule("blocks.1")
    block.mlp = OwnMlp(block.mlp)
    probe.plan_passes(8)
    found = kept_proofs(trainer(tmp_path), probe)
    assert probe.proven is not None
    found.write(probe.proven)
    assert not found.file.exists()
    assert found.read() is None


def decision(ended: Ended, version: int) -> str | None:
    assert (ended.code, ended.err) == (0, "")
    content = json.loads((ended.directory(version) / "run.json").read_text())
    found: str | None = content["decisions"].get("proofs")
    return found


def test_a_run_says_that_it_took_proofs_over_and_gives_the_same_numbers(tmp_path: Path) -> None:
    fresh, again = tmp_path / "fresh", tmp_path / "again"
    fresh.mkdir()
    again.mkdir()
    assert decision(command(again, *SWEEP, "--data.max_images", "20"), 0) is None
    known = command(again, *SWEEP, "--data.max_images", "40")
    says = decision(known, 1)
    assert says is not None
    assert says.startswith("joins, shortcuts and outputs are those that an earlier run proved of this very model")
    new = command(fresh, *SWEEP, "--data.max_images", "40")
    assert decision(new, 0) is None
    assert (known.directory(1) / "masks.csv").read_bytes() == (new.directory(0) / "masks.csv").read_bytes()
    (name,) = (again / "lightning_logs" / "proofs").iterdir()
    assert name.name in says
    assert decision(command(again, *SWEEP, "--data.max_images", "40", "--resume", "never"), 2) is None


def test_two_processes_take_over_what_one_has_proven_and_keep_it_as_one_does(tmp_path: Path) -> None:
    alone, both = tmp_path / "alone", tmp_path / "both"
    alone.mkdir()
    command(alone, *SWEEP, "--data.max_images", "20")
    first = run(both, *SWEEP, "--data.max_images", "20", processes=2)
    assert decision(first, 0) is None
    (of_one,) = (alone / "lightning_logs" / "proofs").iterdir()
    (of_two,) = (both / "lightning_logs" / "proofs").iterdir()
    assert of_one.read_bytes() == of_two.read_bytes()
    known = run(both, *SWEEP, "--data.max_images", "40", processes=2)
    assert decision(known, 1) is not None
    one = command(alone, *SWEEP, "--data.max_images", "40")
    assert (one.directory(1) / "masks.csv").read_bytes() == (known.directory(1) / "masks.csv").read_bytes()
