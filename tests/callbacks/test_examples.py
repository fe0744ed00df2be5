"""`examples.npz` of whole runs: the same from any processes and sessions, of images that could be read, in the key."""

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from numpy.typing import NDArray

from tests import forked
from tests.cli_runs import QUICK, Ended, command, only_message
from tests.describe.test_examples import first

Found = dict[str, NDArray[Any]]
CPU = ("--trainer.accelerator", "cpu")
SETS = [20, 20, 20]  # images of each file

pytestmark = pytest.mark.usefixtures("no_arguments", "no_pictures")

DESCRIBE = ("test", "--trainer.callbacks", "HeadAttention", *CPU, "--data.path", "../set")


def arrays(ended: Ended, run: int = 0) -> Found:
    assert ended.code == 0, ended.err
    with np.load(ended.directory(run) / "examples.npz", allow_pickle=False) as found:
        return {name: found[name] for name in found.files}


def assert_same(one: Found, other: Found) -> None:
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert np.array_equal(array, other[name]), name


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    forked.digits(folder / "set", sum(SETS), len(SETS))
    return folder


@pytest.fixture(scope="module")
def alone(data: Path) -> Found:
    return arrays(forked.run(data / "alone", *DESCRIBE, "--records"))


def test_every_array_is_documented(alone: Found) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs/describe_heads.md").read_text(encoding="utf-8")
    section = text.partition("\n## examples.npz\n")[2].partition("| `kind` | a patch")[0]
    cells = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    named = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert {re.sub(r"layer_\d+", "layer_NNN", name) for name in alone} - {"schema"} == named  # every npz file has it


def test_two_processes_write_what_one_does_to_the_bit(data: Path, alone: Found) -> None:
    assert list(zip(alone["unit"].tolist(), alone["row"].tolist(), strict=True)) == first(SETS, 4)
    assert_same(arrays(forked.run(data / "two", *DESCRIBE, processes=2)), alone)


def test_a_run_that_was_killed_goes_on_with_the_examples_of_its_units(data: Path, alone: Found) -> None:
    folder = data / "killed"
    running = forked.start(folder, *DESCRIBE, "--data.batch_size", "1", "--data.num_workers", "0")
    store, end = folder / "lightning_logs/units", time.monotonic() + 60
    while not list(store.glob("*/units-*.npz")) and time.monotonic() < end:
        time.sleep(0.005)
    running.kill()
    before = len(list(folder.glob("lightning_logs/version_*")))
    ended = forked.run(folder, *DESCRIBE, "--data.batch_size", "1", processes=2)
    found = arrays(ended, before)
    assert json.loads((ended.directory(before) / "run.json").read_text())["units_resumed"] > 0
    whole = forked.run(data / "whole", *DESCRIBE, "--data.batch_size", "1")
    assert_same(found, arrays(whole))
    assert found["source"].tolist() == alone["source"].tolist()


def test_labels_predictions_and_sources_are_those_of_the_records(data: Path, alone: Found) -> None:
    records = data / "alone/lightning_logs/version_0/records"
    for image, (unit, row) in enumerate(zip(alone["unit"].tolist(), alone["row"].tolist(), strict=True)):
        table = pq.read_table(records / f"unit-{unit:05d}.parquet").to_pylist()
        (own,) = [entry for entry in table if entry["row"] == row and entry["mask"] == "none"]
        assert alone["label"][image] == own["label"]
        assert alone["prediction"][image] == own["prediction"]
        assert alone["source"][image] == own["source"]
        assert alone["label_name"][image] == str(own["label"])  # the digits' names


def test_an_image_that_cannot_be_read_gives_its_place_to_the_next(data: Path) -> None:
    folder = data.parent / "damaged"
    forked.digits(folder / "set", sum(SETS), len(SETS))
    lost = first(SETS, 2)
    for unit, row in lost:
        file = folder / f"set/validation-{unit:05}-of-{len(SETS):05}.parquet"
        table = pq.read_table(file)
        cells = table["image"].to_pylist()
        cells[row]["bytes"] = b"no image"
        column = table.schema.get_field_index("image")
        changed = table.set_column(column, table.schema.field("image"), [cells])
        pq.write_table(changed, file)
    found = arrays(forked.run(folder / "run", *DESCRIBE, "--data.on_bad_image", "skip"))
    assert list(zip(found["unit"].tolist(), found["row"].tolist(), strict=True)) == first(SETS, 4, but=lost)


def test_fewer_images_than_wanted_are_fewer_examples_and_said(tmp_path: Path) -> None:
    ended = command(tmp_path, "test", "--trainer.callbacks", "HeadAttention", *CPU, "--data.max_images", "3")
    assert len(arrays(ended)["unit"]) == 3
    assert "examples.npz has 3 images, as no others could be read" in ended.out


def with_examples(folder: Path, examples: int) -> Ended:
    listed = [{"class_path": "HeadAttention", "init_args": {"examples": examples}}]
    file = folder / f"{examples}.yaml"
    file.write_text(yaml.safe_dump({"trainer": {"callbacks": listed}}))
    return command(folder, "test", "--config", os.fspath(file), *QUICK)


def test_the_number_of_examples_is_in_the_key_and_0_writes_no_file(tmp_path: Path) -> None:
    keys = []
    for run, examples in enumerate((0, 2, 4)):
        ended = with_examples(tmp_path, examples)
        assert ended.code == 0, ended.err
        record = json.loads((ended.directory(run) / "run.json").read_text())
        keys.append(record["key"])
        assert {"name": "attention", "offset_maps": True, "examples": examples} in record["statistics"]
        assert (ended.directory(run) / "examples.npz").exists() == (examples > 0)
    assert len(set(keys)) == 3


def test_too_many_examples_are_refused_in_one_line(tmp_path: Path) -> None:
    ended = with_examples(tmp_path, 65)
    assert ended.code == 2
    assert "HeadAttention.examples must be 0 for none, or up to 64, got 65" in only_message(ended)
