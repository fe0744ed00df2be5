"""Files and folders beside the data that are no data: headprobe's own results, other tools' tables, hidden folders."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headprobe.errors import UsageError
from tests.cli_runs import command
from tests.data.parquet_sets import bound, png, table, write_table
from tests.data.sources.folders import crossed, write

STRAY = pa.table({"x": [1]})


def results(folder: Path) -> None:
    """Write what a run leaves behind, as far as it matters here."""
    folder.mkdir(parents=True)
    for name in ("run.json", "masks.csv"):
        (folder / name).write_text("{}")
    pq.write_table(STRAY, folder / "images.parquet")
    (folder / "figure.png").write_bytes(png(1))


@pytest.mark.parametrize("place", ["lightning_logs/version_0", "logs/a/b", "cats/results", "results"])
def test_headprobes_own_results_are_no_part_of_class_folders(tmp_path: Path, place: str) -> None:
    results(write(tmp_path, crossed(["cats", "dogs"], [""])) / place)
    data = bound(tmp_path, classes=2)
    assert (data.class_names, data.expected_images) == (["cats", "dogs"], 4)
    assert not [found for found in data.decisions() if found.about in ("empty classes", "folders in classes")]


@pytest.mark.parametrize("name", ["a.parquet", "test.parquet", "data/a.parquet"])
def test_headprobes_own_results_are_no_part_of_parquet_files(tmp_path: Path, name: str) -> None:
    write_table((tmp_path / name).parent, table([png(1), png(2)], [0, 1]), Path(name).name)
    results(tmp_path / "lightning_logs" / "version_0")
    assert bound(tmp_path, classes=10).expected_images == 2


def test_other_images_of_the_same_names_and_sizes_are_other_data(tmp_path: Path) -> None:
    for name in ("clean", "noisy"):
        write(tmp_path / name, crossed(["a", "b"], [""]), content=name.encode())
        for file in (tmp_path / name).glob("*/*.png"):
            os.utime(file, (1, 1))
    clean = bound(tmp_path / "clean", classes=2).identity()
    assert clean == bound(tmp_path / "clean", classes=2).identity()
    assert clean != bound(tmp_path / "noisy", classes=2).identity()
    (tmp_path / "clean" / "a" / "1.png").write_bytes(b"dirty")
    assert clean != bound(tmp_path / "clean", classes=2).identity()


def test_a_folder_called_like_the_bundled_images_is_ambiguous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "digits", crossed(["a", "b"], [""]))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"write \./digits for the folder"):
        bound("digits")
    assert bound("./digits", classes=2).expected_images == 4


def test_names_that_are_no_text_end_no_run(tmp_path: Path) -> None:
    names = [os.fsdecode(b"caf\xe9_%d" % number) for number in range(10)]
    write(tmp_path / "set", crossed(names, [""]))
    (tmp_path / "set" / names[3] / os.fsdecode(b"b\xe4d.png")).write_bytes(b"none")
    ended = command(
        tmp_path, "test", "--data.path", "set", "--data.num_workers", "0", "--mask-spec", "layer:1", "--records",
        "--model.per_class", "true", "--data.on_bad_image", "skip",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert r"caf\udce9_3" in (ended.directory() / "classes.csv").read_text(encoding="utf-8")
    assert r"b\udce4d.png" in (ended.directory() / "bad_images.csv").read_text(encoding="utf-8")


@pytest.mark.parametrize("stray", ["feat.parquet", "cats/feat.parquet", "extra/emb/e.parquet", "state.json"])
def test_a_stray_file_beside_class_folders_is_no_dataset_with_split_dot(tmp_path: Path, stray: str) -> None:
    file = write(tmp_path, crossed(["cats", "dogs"], [""])) / stray
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(STRAY, file)
    with pytest.raises(UsageError, match=r"--data\.split \. if its folders are the classes"):
        bound(tmp_path, classes=2)
    assert bound(tmp_path, classes=2, split=".").class_names == ["cats", "dogs"]


def test_a_hidden_folders_parquet_file_is_no_dataset(tmp_path: Path) -> None:
    write_table(write(tmp_path, crossed(["cats", "dogs"], [""])) / ".cache" / "x", STRAY)
    assert bound(tmp_path, classes=2).class_names == ["cats", "dogs"]


@pytest.mark.parametrize(
    "names",
    [("images", "masks"), ("images", "labels"), ("img", "annotations"), ("images", "gt"), ("images", "GroundTruth"),
     ("PublicTest", "PrivateTest"), ("gallery", "query"), ("gallery", "probe"), ("public", "hidden")],
)  # fmt: skip
def test_folders_that_are_no_classes_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    with pytest.raises(UsageError, match="are no names of classes"):
        bound(write(tmp_path, crossed(names, [""])), classes=2)
    assert bound(tmp_path, classes=2, split=".").class_names == sorted(names)


def test_a_list_with_a_column_of_splits_says_that_all_are_scored(tmp_path: Path) -> None:
    write(tmp_path, ["1.png", "2.png"])
    (tmp_path / "labels.csv").write_text("image,label,Usage\n1.png,0,train\n2.png,1,test\n")
    (said,) = [
        found
        for found in bound(tmp_path / "labels.csv", class_map="identity").decisions()
        if found.about == "splits of the list"
    ]
    assert "column Usage with test, train" in said.text
    assert said.shown


@pytest.mark.parametrize("head", ["filename,label", "file_name;label"])
def test_metadata_without_the_right_column_lists_those_found(tmp_path: Path, head: str) -> None:
    write(tmp_path, ["1.png", "2.png"])
    (tmp_path / "metadata.csv").write_text(f"{head}\n1.png,0\n".replace(",", head[-6]))
    with pytest.raises(UsageError, match=f"got the columns .*{head.split(',')[0]}"):
        bound(tmp_path)


def test_a_bracket_in_the_name_of_a_folder_of_parquet_files_has_a_remedy(tmp_path: Path) -> None:
    write_table(tmp_path / "d [1]", table([png(1)], [0]))
    with pytest.raises(UsageError, match=r"rename it, or give --data\.path one file"):
        bound(tmp_path / "d [1]")
    assert bound(tmp_path / "d [1]" / "validation.parquet").expected_images == 1
