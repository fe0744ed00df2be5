"""`test --help` is one screen, instant, and true: its options exist, and none of model or data is missing."""

import re
import subprocess
import sys

import pytest

from headprobe import cli
from headprobe.commands.help import SCREENS

COMMANDS = sorted(SCREENS)


def options_of(command: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    """Return all options that the command's own parser has."""
    assert cli.main([command, "--help-all"]) == 0
    return set(re.findall(r"^ +(?:-\w, )?(--[\w.-]+)", capsys.readouterr().out, re.MULTILINE))


def shown(command: str) -> set[str]:
    """Return the options on the screen; those of model.options are any argument of timm's."""
    found = set(re.findall(r"--[a-z][\w.-]*\w", SCREENS[command]))
    return {option for option in found if not option.startswith("--model.options.")} - {"--help-trainer", "--help-all"}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_one_screen_and_nothing_else(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert text == SCREENS[command]
    assert len(text.splitlines()) <= 45
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.usefixtures("no_arguments")
@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_on_the_screen_exists(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(command) - {"--help"} <= options_of(command, capsys) | {"--config"}


@pytest.mark.usefixtures("no_arguments")
def test_no_option_of_model_or_data_is_missing_from_the_screen_of_test(capsys: pytest.CaptureFixture[str]) -> None:
    own = {option for option in options_of("test", capsys) if option.startswith(("--model.", "--data."))}
    assert own - {"--model.options"} <= shown("test")
    more = {"--ablation", "--calibration-file", "--score-heads"}
    assert {"--mask-spec", "--dry-run", "--resume", "--records", "--config", *more} <= shown("test")


@pytest.mark.usefixtures("no_arguments")
def test_the_options_of_fit_are_not_those_of_test(capsys: pytest.CaptureFixture[str]) -> None:
    of_test, of_fit = options_of("test", capsys), options_of("fit", capsys)
    only_fit = {"--model.learning_rate", "--model.warmup", "--data.train_split", "--data.augment", "--data.seed"}
    assert only_fit <= of_fit
    assert not only_fit & of_test
    assert not {"--mask-spec", "--dry-run", "--resume", "--records", "--model.per_class"} & of_fit


@pytest.mark.usefixtures("no_arguments")
def test_the_options_of_lightning_are_behind_an_option_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["test", "--help-trainer"]) == 0
    text = capsys.readouterr().out
    assert "--trainer.gradient_clip_val" in text
    assert "--model.name" not in text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_loads_nothing_heavy(command: str) -> None:
    code = (
        f"import sys; from headprobe.cli import main; assert main([{command!r}, '--help']) == 0; "
        "assert not {'torch', 'lightning', 'timm', 'jsonargparse'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
