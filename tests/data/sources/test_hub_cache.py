"""A hub dataset that was downloaded before is read without the hub, and the run says so; the hub is a mock."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.data.hub_runs import environment
from tests.data.mock_hub import COMMIT, running
from tests.data.parquet_sets import write_files

STORE = """
import datasets, huggingface_hub
datasets.load_dataset("owner/load_dataset")
huggingface_hub.snapshot_download("owner/download", repo_type="dataset")
huggingface_hub.snapshot_download("owner/part", repo_type="dataset", allow_patterns="data/validation-00000*")
"""
"""Stores each dataset in a way of its own, after which it is called; "nothing" is never stored."""
HOW = ("load_dataset", "download", "part", "nothing")
READ = """
import json, sys
from tests.data.parquet_sets import bound, numbers
for options in json.load(sys.stdin):
    try:
        data = bound(**options)
        answer = {"numbers": sorted(numbers(data.stream())), "revision": data.identity()["revision"],
                  "shown": {one.about: one.text for one in data.decisions() if one.shown}}
    except Exception as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(answer))
"""
REQUESTS: list[dict[str, Any]] = [{}, {"split": "test"}, {"revision": COMMIT}, {"revision": "f" * 40}]


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Return what each of REQUESTS got offline, after each way to store; two processes, whose start takes seconds."""
    folder = tmp_path_factory.mktemp("hub")
    files = write_files(folder / "set", [[5, 3], [4, 2]])
    write_files(files, [[2]], split="test")
    with running(files) as hub:
        hub.folders = dict.fromkeys(HOW, files)
        run(STORE, environment(folder / "home", hub.address))
    asked = [{"path": f"owner/{how}", **request} for how in HOW for request in REQUESTS]
    nowhere = "http://127.0.0.1:9"
    said = run(READ, environment(folder / "home", nowhere, HF_HUB_OFFLINE="1"), json.dumps(asked))
    answers = [json.loads(line) for line in said.splitlines()]
    assert len(answers) == len(asked)
    return {how: answers[place * len(REQUESTS) :][: len(REQUESTS)] for place, how in enumerate(HOW)}


def run(code: str, env: dict[str, str], given: str = "") -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, input=given, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("how", ["load_dataset", "download"])
def test_what_was_downloaded_is_read_offline_and_said(offline: dict[str, list[dict[str, Any]]], how: str) -> None:
    plain, test, pinned, other = offline[how]
    assert (plain["numbers"], test["numbers"]) == (list(range(14)), [0, 1])
    assert plain == pinned
    assert plain["revision"] == COMMIT
    assert f"commit {COMMIT}" in plain["shown"]["hub cache"]
    assert other["error"] == "UsageError"
    assert "--data.revision" in other["message"]
    assert other["message"].endswith("f" * 40)


def test_a_part_of_a_split_is_said(offline: dict[str, list[dict[str, Any]]]) -> None:
    plain, test, _, _ = offline["part"]
    assert plain["numbers"] == list(range(8))
    assert plain["shown"]["parts of the split"].startswith("1 of 2 files are here, by their names")
    assert "no such split" in test["message"]


def test_without_a_download_the_message_says_so_and_has_its_command(offline: dict[str, list[dict[str, Any]]]) -> None:
    for answer in offline["nothing"]:
        assert answer["error"] == "RunError"
        assert "HF_HUB_OFFLINE is set" in answer["message"]
        assert "local copy" in answer["message"]
        assert "hf download owner/nothing --repo-type dataset" in answer["message"]
