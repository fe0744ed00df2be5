"""`models`: which of timm's architectures have heads, and what can be measured of them."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import timm

from headprobe.catalog.families import FamilyTable, shipped_families
from headprobe.commands import models
from tests.cli_runs import command, only_message
from tests.test_imports import modules_after

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"


def rows(out: str) -> dict[str, list[str]]:
    """The rows of the printed table by timm family."""
    lines = out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("timm family"))
    return {line.split()[0]: line.split() for line in lines[start + 1 : lines.index("", start)]}


def test_every_timm_family_has_a_row_and_the_totals_are_printed(tmp_path: Path) -> None:
    ended = command(tmp_path, "models")
    assert ended.code == 0
    assert set(rows(ended.out)) == set(shipped_families().with_heads)
    assert "671 names of 51 timm families have 177,215 heads in 13,285 layers of 58 attention classes" in ended.out
    assert max(len(line) for line in ended.out.splitlines()) <= 120


def test_a_row_says_what_is_masked_and_what_is_defined(tmp_path: Path) -> None:
    table = rows(command(tmp_path, "models").out)
    assert table["swin_transformer"][1:] == ["9/9", "204", "window", *["all"] * 8]
    # efficientvit_mit: linear attention has no weights; outputs lie on the image
    assert table["efficientvit_mit"][1:12] == ["7/7", "58", "linear", *["no"] * 6, "all", "no"]
    assert table["byobnet"][1:4] == ["5/53", "5", "pool"]


def test_refused_names_are_counted_with_the_reason(tmp_path: Path) -> None:
    out = " ".join(command(tmp_path, "models").out.split())
    assert "676 names, no attention heads: byobnet 48" in out
    assert "4 names, attention with a single head by design: single-head self-attention: shvit 4" in out


def test_the_page_of_the_documentation_is_what_the_command_prints(tmp_path: Path) -> None:
    ended = command(tmp_path, "models", "--markdown")
    assert ended.code == 0
    assert ended.out == PAGE.read_text(encoding="utf-8")


def test_json_is_the_table_that_ships(tmp_path: Path) -> None:
    assert FamilyTable.from_json(command(tmp_path, "models", "--json").out) == shipped_families()


def test_the_first_line_names_both_releases_of_timm(tmp_path: Path) -> None:
    made_with, installed = shipped_families().timm, metadata.version("timm")
    assert command(tmp_path, "models").out.startswith(f"made with timm {made_with}; installed is timm {installed}")


def test_another_timm_than_the_tables_is_said_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda _: "9.9.9")
    first = command(tmp_path, "models").out.splitlines()[0]
    assert "installed is timm 9.9.9, which may differ" in first
    assert "--survey" in first


def test_a_pattern_keeps_the_timm_families_and_lists_the_names_that_fit(tmp_path: Path) -> None:
    ended = command(tmp_path, "models", "swinv2_tiny*")
    assert list(rows(ended.out)) == ["swin_transformer_v2"]
    assert "Names that fit (2): swinv2_tiny_window8_256, swinv2_tiny_window16_256" in ended.out


def test_a_timm_family_is_printed_in_full(tmp_path: Path) -> None:
    out = " ".join(command(tmp_path, "models", "xcit").out.split())
    assert "timm.models.xcit: 28 of 28 names with heads" in out
    assert "timm.models.xcit.XCA: 528 channel; maps of channels; a head is a group of channels" in out
    assert "not in 528: its attention is between channels, not tokens" in out
    assert "xcit_nano_12_p16_224 (14, 56)" in out


def test_a_model_is_walked_and_printed_in_full(tmp_path: Path) -> None:
    lines = command(tmp_path, "models", "test_vit").out.splitlines()
    assert lines[0] == "test_vit (timm.models.vision_transformer)"
    assert lines[2:4] == [
        "Layers: 6 with 12 heads",
        "  timm.layers.attention.Attention: 6 global; maps of weights",
    ]


def test_a_refused_model_is_printed_with_the_reason(tmp_path: Path) -> None:
    ended = command(tmp_path, "models", "resnet18")
    assert (ended.code, ended.out) == (0, "resnet18 (timm.models.resnet): refused, no attention heads\n")


def test_json_of_a_model_is_its_record(tmp_path: Path) -> None:
    record = json.loads(command(tmp_path, "models", "test_vit", "--json").out)
    assert (record["name"], record["family"], record["refused"]) == ("test_vit", "vision_transformer", "")
    assert record["classes"]["timm.layers.attention.Attention"]["kinds"] == {"global": 6}


def test_a_survey_walks_the_installed_timm_and_says_how_far_it_is(tmp_path: Path) -> None:
    ended = command(tmp_path, "models", "test_vit*", "--survey")
    names = timm.list_models("test_vit*")
    assert ended.code == 0
    assert ended.err.endswith(f"\rwalked {len(names)} of {len(names)} models\n")
    assert f"Names that fit ({len(names)})" in ended.out


def test_a_survey_does_not_read_the_table_that_it_may_be_about_to_replace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(models, "shipped_families")
    assert command(tmp_path, "models", "test_vit", "--survey", "--json").code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["swin"], "did you mean '*swin*'?, got 'swin'"),
        (["swin_transformr"], "did you mean swin_transformer"),
        (["deit_tiny_patch16_225"], "did you mean deit_tiny_patch16_224"),
        (["nothing*like*it"], "headprobe models lists the timm families, got 'nothing*like*it'"),
        (["nothing*like*it", "--survey"], "headprobe models lists the timm families, got 'nothing*like*it'"),
        (["--workers", "0"], "--workers must be at least 1, got 0"),
        (["xcit", "--markdown"], "goes with no pattern or --json, got xcit"),
        (["--marckdown"], "did you mean --markdown"),
    ],
)
def test_wrong_requests_are_one_message_and_code_2(tmp_path: Path, words: list[str], message: str) -> None:
    ended = command(tmp_path, "models", *words)
    assert ended.code == 2
    assert message in only_message(ended)


@pytest.mark.parametrize("heavy", ["torch", "timm", "lightning"])
@pytest.mark.parametrize("words", [[], ["xcit"], ["swin*", "--json"]])
def test_reading_the_table_imports_nothing_heavy(heavy: str, words: list[str]) -> None:
    loaded = modules_after("-m", "headprobe", "models", *words)
    assert "jsonargparse" in loaded
    assert heavy not in loaded


def test_several_processes_find_what_one_finds(tmp_path: Path) -> None:
    words = ["models", "test_vit*", "--survey", "--json"]
    several = [sys.executable, "-m", "headprobe", *words, "--workers", "2"]
    done = subprocess.run(several, capture_output=True, text=True, cwd=tmp_path, check=True, timeout=240)
    assert FamilyTable.from_json(done.stdout) == FamilyTable.from_json(command(tmp_path, *words).out)
