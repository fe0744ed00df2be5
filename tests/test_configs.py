"""Every file in configs/ says how it is used and what to expect, and the command line takes it."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import timm
import yaml

from headprobe import cli
from headprobe.backbone.weights import BUNDLED

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

pytestmark = [
    pytest.mark.usefixtures("no_arguments", "at_root"),
    pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem),
]


@pytest.fixture
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run commands where the first lines say: in the repository, with nothing fetched."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def header(config: Path) -> list[str]:
    return config.read_text(encoding="utf-8").splitlines()[:2]


def command(config: Path) -> list[str]:
    """The words of the first line's command, after `python -m headprobe`."""
    return shlex.split(header(config)[0].removeprefix("# python -m headprobe"))


def content(config: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(config.read_text(encoding="utf-8"))
    return loaded


def test_the_first_line_is_the_command_that_uses_the_file(config: Path) -> None:
    assert re.fullmatch(
        rf"# python -m headprobe (study|test|fit) --config {config.relative_to(ROOT).as_posix()}( .+)?",
        header(config)[0],
    )


def test_the_second_line_says_what_to_expect_in_figures(config: Path) -> None:
    assert re.match(r"# Expect.*\d", header(config)[1])


def test_the_command_line_takes_every_key(config: Path) -> None:
    assert cli.main([*command(config), "--print_config"]) == 0


def test_the_model_is_one_of_timm_or_bundled(config: Path) -> None:
    name = content(config)["model"]["name"]
    assert name in BUNDLED or timm.is_model(name)


def test_weights_that_are_not_given_exist(config: Path) -> None:
    model = content(config)["model"]
    published = model["name"] in BUNDLED or timm.models.is_model_pretrained(model["name"])
    assert published or not model.get("pretrained", True) or "weights" in model


@pytest.mark.parametrize("spec", ["each:layer"])
def test_the_model_can_be_built_and_masked(config: Path, spec: str) -> None:
    words = command(config)
    chosen = words[words.index("--mask-spec") + 1] if "--mask-spec" in words else spec
    model = content(config)["model"]
    options = ["--model.options", yaml.safe_dump(model.get("options", {}), default_flow_style=True)]
    assert cli.main(["masks", chosen, "--model.name", model["name"], *options]) == 0
