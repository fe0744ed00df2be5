"""The hub's client is real, the hub is not: it runs on loopback, in a process whose HF_ENDPOINT names it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from headprobe.data.sources import retries
from headprobe.data.sources.hub import commit
from headprobe.data.sources.source import safe_text
from tests.data.hub_runs import TOKEN, environment, read_all
from tests.data.mock_hub import COMMIT, Fault, running
from tests.data.parquet_sets import write_files

ASK = """
import json, sys
from tests.data.parquet_sets import bound, numbers
for options in json.load(sys.stdin):
    try:
        data = bound(**options)
        batches = list(data.test_dataloader())
        answer = {"numbers": numbers(batches), "failures": [batch.failure for batch in batches if batch.failure],
                  "sizes": data.unit_sizes, "units": data.units, "images": data.expected_images,
                  "description": data.identity()}
    except Exception as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(answer))
"""
REQUESTS: dict[str, dict[str, Any]] = {
    "plain": {"path": "owner/set"},
    "workers": {"path": "owner/set", "num_workers": 2, "revision": COMMIT},
    "row groups": {"path": "owner/set", "unit": "row_group"},
    "max images": {"path": "owner/set", "max_images": 5},
    "no login": {"path": "owner/gated401"},
    "no terms": {"path": "owner/gated403"},
    "missing": {"path": "owner/missing"},
    "revision": {"path": "owner/set", "revision": "nope"},
    "name": {"path": "owner/set", "name": "nope"},
    "split": {"path": "owner/set", "split": "nope"},
    "broken": {"path": "owner/set", "split": "test"},
}


def ask(folder: Path, requests: list[dict[str, Any]], address: str = "", **more: str) -> list[dict[str, Any]]:
    """Open datasets in a fresh process; the hub's address is read when its client is imported."""
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        input=json.dumps(requests),
        env=environment(folder / "home", address, **more),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Return what each of REQUESTS got; all in one process, for its start takes seconds."""
    folder = tmp_path_factory.mktemp("hub")
    files = write_files(folder / "set", [[5, 3], [4, 2]])
    write_files(files, [[2], [2]], split="test")
    (files / "data" / "test-00001-of-00002.parquet").write_bytes(b"PAR1 and then nothing")
    with running(files) as hub:
        hub.faults["set"] = [Fault("/resolve/", 503, times=2)]  # the first reads meet an overloaded server
        found = ask(folder, list(REQUESTS.values()), hub.address)
    return dict(zip(REQUESTS, found, strict=True))


@pytest.mark.parametrize("case", ["plain", "workers", "row groups"])
def test_every_image_of_a_hub_dataset_comes_once(answers: dict[str, dict[str, Any]], case: str) -> None:
    assert sorted(answers[case]["numbers"]) == list(range(14))


def test_units_are_files_unless_row_groups_are_asked_for(answers: dict[str, dict[str, Any]]) -> None:
    assert (answers["plain"]["units"], answers["plain"]["sizes"]) == (2, None)
    assert (answers["row groups"]["units"], answers["row groups"]["sizes"]) == (4, [5, 3, 4, 2])


def test_the_description_holds_the_commit_that_was_read(answers: dict[str, dict[str, Any]]) -> None:
    assert answers["plain"]["description"]["revision"] == COMMIT
    assert answers["plain"]["description"] == answers["workers"]["description"]


def test_max_images_of_a_hub_dataset_are_known_beforehand_and_spread_over_each_file(
    answers: dict[str, dict[str, Any]],
) -> None:
    taken = answers["max images"]["numbers"]
    assert answers["max images"]["images"] == len(set(taken)) == 5
    # both halves of both files, whose images are 0 to 7 and 8 to 13
    assert all(set(half) & set(taken) for half in (range(4), range(4, 8), range(8, 11), range(11, 14)))


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("no login", ["owner/gated401 is gated", "`hf auth login`", "HF_TOKEN", "accept the terms at", "local copy"]),
        ("no terms", ["owner/gated403 is gated", "no access yet", "accept the terms at"]),
        ("missing", ["no such dataset on the hub", "--data.path", "got owner/missing"]),
        ("revision", ["owner/set cannot be opened", "Revision 'nope' doesn't exist", "--data.revision"]),
        ("name", ["owner/set cannot be opened", "'nope' not found", "--data.name"]),
        ("split", ["choose --data.split from validation, test", "got nope"]),
    ],
)
def test_each_refusal_has_its_own_message(answers: dict[str, dict[str, Any]], case: str, words: list[str]) -> None:
    assert answers[case]["error"] == "UsageError"
    for word in words:
        assert word in answers[case]["message"]


def test_a_broken_file_on_the_hub_is_named_and_what_came_before_stays(answers: dict[str, dict[str, Any]]) -> None:
    (failure,) = answers["broken"]["failures"]
    assert failure.startswith("test-00001-of-00002.parquet (unit 1) cannot be read: ")
    assert answers["broken"]["numbers"] == [0, 1]


def test_a_hub_that_cannot_be_reached_is_given_up_soon(tmp_path: Path) -> None:
    (answer,) = read_all(tmp_path, "http://127.0.0.1:9", [{"path": "owner/set"}])
    assert answer.error == "RunError"
    assert "the hub cannot be reached" in answer.failures[0]
    assert "is no file or folder here, and is looked for on the hub" in answer.failures[0]
    assert answer.seconds < 10  # with the waits of read_all, a twentieth of what users get
    assert retries.OPENING <= 60


def test_a_home_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = write_files(tmp_path / "set", [[2]])
    (answer,) = ask(tmp_path, [{"path": str(path)}], HF_HOME=str(tmp_path / "file" / "home"))
    assert answer["error"] == "RunError"
    assert "Set HF_HOME to a folder you can write to" in answer["message"]


def test_nothing_of_a_token_stays_in_a_message() -> None:
    error = OSError(f"GET https://cdn.example/file?X-Signature=abc failed\nAuthorization: Bearer {TOKEN} token={TOKEN}")
    text = safe_text(error)
    assert "secret" not in text.lower()
    assert "abc" not in text
    assert "\n" not in text
    assert "https://cdn.example/file?..." in text


def test_the_commit_is_read_from_a_files_address() -> None:
    assert commit([f"hf://datasets/owner/set@{COMMIT}/data/a.parquet"]) == COMMIT
    assert commit(["hf://datasets/owner/set@main/data/a.parquet"]) is None
    assert commit([]) is None
