"""A hub that goes away in the middle of a run: the same command goes on, and asks for the rest only."""

import json
from pathlib import Path

import pytest

from tests.cli_runs import Ended
from tests.data.mock_hub import Fault, running
from tests.data.parquet_sets import write_files
from tests.data.test_security import run

SWEEP = ("--mask-spec", "each:layer", "--data.num_workers", "0", "--trainer.accelerator", "cpu")


@pytest.mark.slow
def test_a_run_that_lost_the_hub_goes_on_with_the_files_that_are_missing(tmp_path: Path) -> None:
    with running(write_files(tmp_path / "served", [[5], [4, 2], [6], [3]])) as hub:
        expected = run(tmp_path / "alone", hub, "test", "--data.path", "owner/set", *SWEEP)
        assert expected.returncode == 0, expected.stderr.decode()
        hub.faults = {"set": [Fault("validation-00002", 500)]}
        broken = run(tmp_path / "run", hub, "test", "--data.path", "owner/set", *SWEEP)
        ended = Ended(broken.returncode, broken.stdout.decode(), broken.stderr.decode(), tmp_path / "run")
        assert ended.code == 1
        assert "validation-00002-of-00004.parquet" in ended.err
        assert "then run the same command again to resume" in ended.err
        assert "Traceback" not in ended.err
        hub.faults = {}
        hub.requests.clear()
        again = run(tmp_path / "run", hub, "test", "--data.path", "owner/set", *SWEEP)
        assert again.returncode == 0, again.stderr.decode()
        read = {
            name for name in ("00000", "00001", "00002", "00003") if any(name in one for one in bodies(hub.requests))
        }
    assert "Resuming: 2 of 4 units" in again.stdout.decode()
    assert {"00002", "00003"} <= read
    assert "00001" not in read  # the first file is opened to know its columns
    results = ended.directory(1)
    assert json.loads((results / "run.json").read_text())["units_resumed"] == 2
    alone = tmp_path / "alone" / "lightning_logs" / "version_0" / "masks.csv"
    assert (results / "masks.csv").read_bytes() == alone.read_bytes()


def bodies(requests: list[str]) -> list[str]:
    return [request for request in requests if request.startswith("GET") and "/resolve/" in request]
