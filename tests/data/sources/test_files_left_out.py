"""Every file of a class folder is an image, a bad image, or counted in one line as plainly something else."""

import os
from pathlib import Path

import pytest
from PIL import Image

from headprobe.text import Decision
from tests.data.parquet_sets import bound, encoded, png, read_all
from tests.data.sources.folders import write

TWO = ["a/0.png", "b/0.png"]


def decisions(path: Path, classes: int = 2) -> dict[str, Decision]:
    return {decision.about: decision for decision in bound(path, classes=classes).decisions()}


@pytest.mark.parametrize("name", ["1.jfif", "1.JPE", "1.JPG~", "1.jpg_large", "1", "photo 1.0", "1.jpg.tmp"])
def test_a_jpeg_is_an_image_whatever_it_is_called(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path, TWO)
    write(folder, [f"a/{name}"], encoded(Image.new("RGB", (20, 12)), "jpeg"))
    outcome = read_all(folder, classes=2)
    assert (len(outcome.images), outcome.said) == (3, "")
    assert "files left out" not in decisions(folder)


@pytest.mark.parametrize("name", ["1.heic", "1.avif", "1.jp2", "1.svg", "1.cr2", "1"])
def test_what_may_be_an_image_and_is_not_read_is_a_bad_image(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path, TWO)
    write(folder, [f"a/{name}"], b"\0\0\0\x18ftypheic and so on")
    outcome = read_all(folder, classes=2)
    assert len(outcome.images) == 2
    assert (
        outcome.said
        == f"a/{name}: not an image file of a kind that is read here (JPEG, PNG, WEBP, GIF, BMP, TIFF, PPM)"
    )


OTHER = [
    *("a/notes.txt", "a/Thumbs.db", "a/desktop.ini", "a/.DS_Store", "a/._0.png", "b/0.XML", "b/README", "b/film.mp4"),
    *("b/@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg", "b/.thumbnails/0.png", "b/deep/x.json", "@eaDir/a.png", "#recycle/0.png"),
]


def test_what_is_plainly_no_image_is_counted_in_one_line(tmp_path: Path) -> None:
    folder = write(tmp_path, [*TWO, *OTHER, "README.md"])
    left_out = decisions(folder)["files left out"]
    assert left_out.shown
    assert left_out.text.startswith("13 files are plainly no images (3 hidden, 2 @eaDir, ")
    assert left_out.text.endswith(", first #recycle")
    assert bound(folder, classes=2).expected_images == 2
    assert "\n" not in left_out.text


def test_one_file_is_counted_as_one(tmp_path: Path) -> None:
    folder = write(tmp_path, [*TWO, "b/x.txt"])
    assert decisions(folder)["files left out"].text == "1 file is plainly no image (1 .txt), first b/x.txt"


def test_a_pipe_is_counted(tmp_path: Path) -> None:
    folder = write(tmp_path, TWO)
    os.mkfifo(folder / "a" / "pipe.png")
    assert "1 pipe or device" in decisions(folder)["files left out"].text


def test_images_in_no_class_folder_are_counted(tmp_path: Path) -> None:
    folder = write(tmp_path, [*TWO, "overview.png"])
    text = decisions(folder)["images left out"].text
    assert text == "1 image in no class folder, first overview.png"
    assert bound(folder, classes=2).expected_images == 2


def test_a_class_folder_without_images_stays_a_class_and_is_said(tmp_path: Path) -> None:
    folder = write(tmp_path, [*TWO, "c/", "d/.gitkeep", "d/Thumbs.db", "annotations/x.xml"])
    data = bound(folder, classes=4)
    assert data.class_names == ["a", "b", "c", "d"]
    said = {decision.about: decision.text for decision in data.decisions() if decision.shown}
    assert said["empty classes"] == "2 class folders without an image: c, d; still classes of the data"
    assert said["folders left out"] == "1 folder of other files only, taken for no class: annotations"


def test_images_deeper_in_a_class_folder_are_said(tmp_path: Path) -> None:
    folder = write(tmp_path, [*TWO, "b/more/1.png"])
    text = "1 image lies in folders inside of the class folders, first b/more/1.png: the outer one is the class"
    assert decisions(folder)["folders in classes"] == Decision("folders in classes", text, shown=True)


def test_an_image_more_changes_the_key_and_another_file_does_not(tmp_path: Path) -> None:
    folder = write(tmp_path, TWO)
    before = bound(folder, classes=2).identity()
    (folder / "a" / "Thumbs.db").write_bytes(b"x")
    assert bound(folder, classes=2).identity() == before
    (folder / "a" / "1.jfif").write_bytes(png(1))
    assert bound(folder, classes=2).identity() != before
