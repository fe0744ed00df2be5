"""Finished units on disk: few files, whole or not there, one run at a time, and never another run's."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from headprobe.errors import RunError, UsageError
from headprobe.files import Lock, is_held, writing
from headprobe.units.coverage import Coverage
from headprobe.units.mismatch import differences, refuse_differences
from headprobe.units.store import UnitStore, find_units
from headprobe.units.tree import NamedSums, UnitTree, merge_sums, node_of, span_of, unit_files

SESSION = {"command": "headprobe test", "images": 20}
DESCRIBE: dict[str, Any] = {"model": {"name": "vit"}, "data": {"max_images": 40}, "masks": [["layer:3", "aa"]]}


class Numbers:
    """A sum of one array."""

    def __init__(self, values: NDArray[np.generic]) -> None:
        self.values = values

    def merge(self, other: "Numbers") -> None:
        self.values = self.values + other.values  # type: ignore[operator]  # floats

    def to_arrays(self) -> dict[str, NDArray[np.generic]]:
        return {"values": self.values}


def part(unit: int) -> NamedSums:
    coverage = Coverage()
    coverage.rows, coverage.budgets = {unit: 4}, {unit: 80 - unit}
    return {"coverage": coverage, "scores": Numbers(np.random.default_rng(unit).normal(size=5))}


def tree(units: int, done: list[int]) -> UnitTree[NamedSums]:
    grown: UnitTree[NamedSums] = UnitTree(units, merge_sums)
    for unit in done:
        grown.add(unit, part(unit))
    return grown


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("units-*"))


@pytest.mark.parametrize("units", [1, 2, 3, 5, 8, 13, 33])
def test_every_node_is_found_again_by_the_units_of_its_file(units: int) -> None:
    for level in range(units.bit_length() + 1):
        for index in range(-(-units // (1 << level))):
            span = span_of((level, index), units)
            assert span_of(node_of(span, units), units) == span


def test_units_of_no_node_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="units 1 to 2 are no node of 5 units"):
        node_of((1, 2), 5)
    (tmp_path / "units-00001-00002.npz").write_bytes(b"")
    with pytest.raises(RunError, match=r"units-00001-00002\.npz', which holds finished units, is broken"):
        UnitStore(tmp_path, 5).finished()


def test_stored_units_come_back_with_the_same_bits(tmp_path: Path) -> None:
    grown = tree(5, [0, 1, 2, 4])
    UnitStore(tmp_path, 5).save(grown.nodes)
    again = UnitStore(tmp_path, 5)
    finished = again.finished()
    assert finished.rows == {0: 4, 1: 4, 2: 4, 4: 4}
    assert finished.least_budget == 76
    spans = {span_of(node, 5): whole for node, whole in grown.nodes.items()}
    for node in finished.nodes:
        expected = spans[span_of(node, 5)]["scores"].values
        assert np.array_equal(again.load(node)["scores"]["values"], expected)


@pytest.mark.parametrize("units", [14, 100])
def test_few_files_are_kept_and_the_whole_is_one(tmp_path: Path, units: int) -> None:
    store, grown = UnitStore(tmp_path, units), tree(units, [])
    for unit in range(units):
        grown.add(unit, part(unit))
        store.save(grown.nodes)
        assert len(names(tmp_path)) <= units.bit_length()
    assert names(tmp_path) == [f"units-00000-{units - 1:05d}.npz"]


def test_a_lone_last_unit_is_stored_once_and_not_deleted_by_its_own_successor(tmp_path: Path) -> None:
    UnitStore(tmp_path, 5).save(tree(5, [4]).nodes)
    again = UnitStore(tmp_path, 5)
    (node,) = again.finished().nodes
    again.load(node)
    again.save(tree(5, [4]).nodes)
    assert names(tmp_path) == ["units-00004-00004.npz"]


def test_files_that_a_crash_left_beside_what_replaces_them_do_not_count(tmp_path: Path) -> None:
    UnitStore(tmp_path, 4).save(tree(4, [0]).nodes)
    UnitStore(tmp_path, 4).save(tree(4, [1]).nodes)
    UnitStore(tmp_path, 4).save(tree(4, [0, 1]).nodes)
    (tmp_path / "units-00002-00002.npz.tmp").write_bytes(b"half")
    assert len(names(tmp_path)) == 4
    store = UnitStore(tmp_path, 4)
    assert store.open(DESCRIBE, SESSION).rows == {0: 4, 1: 4}
    assert names(tmp_path) == ["units-00000-00001.npz"]
    store.close()


def test_a_broken_file_is_an_error_and_never_counts_as_done(tmp_path: Path) -> None:
    UnitStore(tmp_path, 4).save(tree(4, [0, 1]).nodes)
    file = tmp_path / "units-00000-00001.npz"
    for broken in (b"", b"no npz", file.read_bytes()[:-40]):
        file.write_bytes(broken)
        with pytest.raises(RunError, match=r"units-00000-00001\.npz', which holds finished units, is broken .*delete"):
            UnitStore(tmp_path, 4).finished()


@pytest.mark.parametrize("arrays", [{}, {"coverage/units": [0]}, {"coverage/bad": "x"}, {"scores/values": [1.0]}])
def test_a_file_of_other_arrays_is_an_error(tmp_path: Path, arrays: dict[str, Any]) -> None:
    np.savez(tmp_path / "units-00000-00001.npz", **arrays)
    with pytest.raises(RunError, match="which holds finished units, is broken"):
        UnitStore(tmp_path, 4).finished()


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"units": "4", "identity": {}, "sessions": []}', '{"units": 4, "identity": {}, "sessions": {}}'],
)
def test_a_broken_description_is_named_and_the_units_beside_it_stay(tmp_path: Path, content: str) -> None:
    UnitStore(tmp_path, 4).save(tree(4, [0, 1]).nodes)
    (tmp_path / "store.json").write_text(content)
    with pytest.raises(RunError, match=r"store\.json'.* delete this file alone"):
        UnitStore(tmp_path, 4).open(DESCRIBE, SESSION)
    (tmp_path / "store.json").unlink()
    store = UnitStore(tmp_path, 4)
    assert store.open(DESCRIBE, SESSION).rows == {0: 4, 1: 4}
    store.close()


def test_asking_who_holds_a_lock_never_refuses_a_run(tmp_path: Path) -> None:
    ask = (
        "import sys, time; from pathlib import Path; from headprobe.files import is_held\n"
        "end = time.monotonic() + 2\nwhile time.monotonic() < end: is_held(Path(sys.argv[1]))\n"
    )
    (tmp_path / "lock").write_text("")
    asker = subprocess.Popen([sys.executable, "-c", ask, str(tmp_path / "lock")])
    while asker.poll() is None:
        lock = Lock(tmp_path / "lock")
        lock.take()
        lock.release()


def test_two_processes_that_write_one_file_never_mix_their_bytes(tmp_path: Path) -> None:
    place = tmp_path / "file"
    with writing(place) as mine:
        mine.write(b"A" * 10)
        other = (
            "import sys; from pathlib import Path; from headprobe.files import write_bytes\n"
            "write_bytes(Path(sys.argv[1]), b'B' * 4)\n"
        )
        subprocess.run([sys.executable, "-c", other, str(place)], check=True)
        assert place.read_bytes() == b"BBBB"
    assert place.read_bytes() == b"A" * 10


def test_a_damaged_byte_never_changes_a_number(tmp_path: Path) -> None:
    UnitStore(tmp_path, 4).save(tree(4, [0, 1]).nodes)
    file = tmp_path / "units-00000-00001.npz"
    content, draw = file.read_bytes(), random.Random(0)
    expected = UnitStore(tmp_path, 4).load((1, 0))
    for _ in range(300):
        damaged = bytearray(content)
        damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(bytes(damaged))
        try:
            found = UnitStore(tmp_path, 4).load((1, 0))
        except RunError:
            continue
        if found.keys() == expected.keys():  # a damaged name is refused where metrics are made of arrays
            assert all(found[n].keys() != expected[n].keys() or same(found[n], expected[n]) for n in expected)


def same(one: dict[str, NDArray[np.generic]], other: dict[str, NDArray[np.generic]]) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in other)


HOLD = """
import sys, time
from pathlib import Path
from headprobe.files import Lock
lock = Lock(Path(sys.argv[1]))
lock.take()
print("taken", flush=True)
time.sleep(60)
"""


def hold(path: Path) -> "subprocess.Popen[str]":
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "taken\n"
    return process


def test_a_store_is_one_runs_at_a_time_and_free_when_its_process_is_killed(tmp_path: Path) -> None:
    holder = hold(tmp_path / "lock")
    try:
        with pytest.raises(
            UsageError, match=rf"at work on the same units \(process {holder.pid} on .*headprobe status"
        ):
            UnitStore(tmp_path, 4).open(DESCRIBE, SESSION)
        assert is_held(tmp_path / "lock")
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.communicate()
    deadline = time.monotonic() + 10
    while is_held(tmp_path / "lock") and time.monotonic() < deadline:
        time.sleep(0.05)
    store = UnitStore(tmp_path, 4)
    assert store.open(DESCRIBE, SESSION).rows == {}
    store.close()


def test_sessions_are_noted(tmp_path: Path) -> None:
    for status in ("interrupted", "done"):
        store = UnitStore(tmp_path, 4)
        store.open(DESCRIBE, SESSION)
        store.save(tree(4, [0, 1]).nodes)
        store.end(status)
        store.close()
    sessions = json.loads((tmp_path / "store.json").read_text())["sessions"]
    assert [(one["status"], one["units_before"], one["images_before"]) for one in sessions] == [
        ("interrupted", 0, 0),
        ("done", 2, 8),
    ]


def test_what_differs_is_said_in_words() -> None:
    other = {"model": {"name": "vit"}, "data": {"max_images": 50}, "masks": [["layer:4", "bb"]], "more": 1}
    assert differences(DESCRIBE, other) == [
        "data.max_images: 40 here, 50 there",
        'masks: [["layer:3", "aa"]] here, [["layer:4", "bb"]] there',
        "more: null here, 1 there",
    ]
    assert differences(DESCRIBE, json.loads(json.dumps(DESCRIBE))) == []


def test_units_of_another_run_are_refused(tmp_path: Path) -> None:
    store = UnitStore(tmp_path, 4)
    store.open(DESCRIBE, SESSION)
    store.close()
    refuse_differences(tmp_path, DESCRIBE)
    with pytest.raises(UsageError, match=r"units of another run.*\(headprobe test\)") as refused:
        refuse_differences(tmp_path, {**DESCRIBE, "data": {"max_images": 50}})
    assert "data.max_images: 50 here, 40 there" in str(refused.value)


def test_a_place_without_units_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no units of a run here"):
        find_units(tmp_path)


def test_forgetting_deletes_the_units_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    UnitStore(tmp_path, 4).save(tree(4, [0, 1, 3]).nodes)
    store = UnitStore(tmp_path, 4)
    store.forget()
    assert not unit_files(tmp_path)
    assert (tmp_path / "mine.txt").exists()
    store.close()
