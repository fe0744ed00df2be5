import io
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
from PIL import Image

import headprobe.data.digits
from headprobe.data.digits.build import build, choose_test_rows
from headprobe.data.sources.bundled import BundledSource, open_bundled
from headprobe.data.sources.source import Request, open_source
from headprobe.errors import UsageError

FOLDER = Path(headprobe.data.digits.__file__).parent


def rows(split: str) -> list[tuple[int, npt.NDArray[np.uint8], int]]:
    """Return (row of scikit-learn's set, pixels, label) of a bundled file."""
    content = pq.read_table(FOLDER / f"{split}.parquet").to_pylist()
    pixels = [np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))) for row in content]
    names = [int(row["image"]["path"].removeprefix("digit_").removesuffix(".png")) for row in content]
    return list(zip(names, pixels, [row["label"] for row in content], strict=True))


def test_both_splits_together_are_scikit_learns_digits() -> None:
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    found = sorted([*rows("train"), *rows("test")], key=lambda row: row[0])
    assert [row for row, _, _ in found] == list(range(1797))
    for row, pixels, label in found:
        assert label == digits.target[row]
        assert np.array_equal(pixels, np.round(digits.images[row] * 255 / 16))


def test_the_test_split_is_balanced() -> None:
    assert np.bincount([label for _, _, label in rows("test")]).tolist() == [50] * 10


def test_files_have_several_row_groups_and_are_small() -> None:
    for split, groups in (("train", 13), ("test", 5)):
        assert pq.read_metadata(FOLDER / f"{split}.parquet").num_row_groups == groups
    assert sum(file.stat().st_size for file in FOLDER.glob("*.parquet")) < 600_000


def test_the_choice_of_test_rows_is_fixed() -> None:
    labels = [row % 10 for row in range(1000)]
    chosen = choose_test_rows(labels)
    assert len(chosen) == 500
    assert sorted(chosen)[:8] == sorted(choose_test_rows(labels))[:8]
    digits = {label: row for row, _, label in rows("test")}
    assert set(digits) == set(range(10))


def test_building_again_gives_the_same_rows(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    build(tmp_path)
    for split in ("train", "test"):
        assert pq.read_table(tmp_path / f"{split}.parquet").equals(pq.read_table(FOLDER / f"{split}.parquet"))


def copied(folder: Path) -> Path:
    return Path(shutil.copytree(FOLDER, folder / "copy", ignore=shutil.ignore_patterns("*.py", "*.safetensors")))


@pytest.mark.parametrize("more", [{}, {"split": "train"}, {"labelled": False}, {"unit": "row_group", "sizes": True}])
def test_the_bundled_digits_are_read_as_a_copy_of_their_folder_is(more: dict[str, Any], tmp_path: Path) -> None:
    bundled, copy = (open_source(Request(path, **more)) for path in ("digits", str(copied(tmp_path))))
    assert isinstance(bundled, BundledSource)
    assert not isinstance(copy, BundledSource)
    for name in ("units", "unit_sizes", "images", "labels", "identity", "shuffled"):
        assert getattr(bundled, name) == getattr(copy, name), name
    for unit in range(bundled.units):
        assert bundled.unit_name(unit) == copy.unit_name(unit)
        assert list(bundled.chunks(unit, 32)) == list(copy.chunks(unit, 32))


@pytest.mark.parametrize("more", [{"unit": "file"}, {"label_column": "image"}, {"name": "default"}])
def test_unusual_requests_of_the_bundled_digits_are_opened_as_any_folder_is(more: dict[str, Any]) -> None:
    assert open_bundled(Request("digits", **more), FOLDER) is None


def test_a_split_that_the_bundled_digits_lack_is_refused_with_the_choices() -> None:
    with pytest.raises(UsageError, match=r"choose --data\.split from train, test, got val"):
        open_source(Request("digits", split="val"))


def test_the_bundled_digits_are_read_without_datasets() -> None:
    code = (
        "import sys; from headprobe.data.sources.source import Request, open_source; "
        "next(open_source(Request('digits')).chunks(0, 1)); sys.exit(bool({'datasets', 'pandas'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
