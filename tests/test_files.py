from pathlib import Path
from typing import Any

import pytest

from headprobe import files
from headprobe.errors import RunError


def refuse_renames(monkeypatch: pytest.MonkeyPatch, times: int) -> list[Path]:
    """Refuse to rename over a file so many times, as Windows does while a reader has it open."""
    tries: list[Path] = []
    real = Path.replace

    def refusing(path: Path, target: Any) -> Path:
        tries.append(path)
        if len(tries) <= times:
            raise PermissionError(13, "Permission denied")
        return real(path, target)

    monkeypatch.setattr(Path, "replace", refusing)
    monkeypatch.setattr(files, "RENAME_PAUSES", (0.0, 0.0))
    return tries


def test_a_file_that_a_reader_holds_open_on_windows_is_replaced_a_moment_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = refuse_renames(monkeypatch, times=2)
    files.write_text(tmp_path / "a", "new")
    assert len(tries) == 3
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "new"


def test_a_file_that_stays_open_is_one_message_and_keeps_its_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.write_text(tmp_path / "a", "old")
    refuse_renames(monkeypatch, times=9)
    with pytest.raises(RunError, match=r"cannot write .*Permission denied"):
        files.write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
