"""Opens and reads datasets of the mock hub in a fresh process: its client reads the hub's address when imported."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOKEN = "hf_aVerySecretToken0123456789"
BETWEEN = "=== next case ==="
READ = """
import json, multiprocessing, sys, time
from headprobe.data.sources import retries
from tests.data.parquet_sets import bound, numbers
for options in json.load(sys.stdin):
    retries.OPENING, retries.READING = options.pop("waits", (1.5, 3.0))
    retries.FIRST_PAUSE, retries.QUIET, retries.ANSWER = 0.1, options.pop("quiet", 0.0), 1.0
    method = options.pop("method", "fork")
    multiprocessing.set_start_method(method, force=True)
    began = time.monotonic()
    try:
        data = bound(**options)
        batches = list(data.test_dataloader())
        rows = [(batch.unit, row) for batch in batches for row in batch.rows.tolist()]
        answer = {"numbers": numbers(batches), "rows": rows,
                  "failures": [batch.failure for batch in batches if batch.failure]}
    except Exception as error:
        answer = {"numbers": [], "rows": [], "failures": [str(error)], "error": type(error).__name__}
    print(json.dumps(answer | {"seconds": time.monotonic() - began}), flush=True)
    print("=== next case ===", file=sys.stderr, flush=True)
"""


@dataclass(frozen=True)
class Answer:
    """What reading one dataset gave: images, failures, lines on standard error, seconds."""

    numbers: list[int]
    rows: list[list[int]]
    failures: list[str]
    error: str | None
    said: str
    seconds: float

    @property
    def lines(self) -> list[str]:
        """What headprobe itself said."""
        return [line for line in self.said.splitlines() if line.startswith("headprobe: ")]


def environment(home: Path, address: str, **more: str) -> dict[str, str]:
    places = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    # no proxy may stand between the client and loopback
    hidden = {name: "" for name in os.environ if name.lower().endswith("_proxy")}
    ours = {"PYTHONPATH": os.pathsep.join(places), "HF_HOME": str(home), "HF_TOKEN": TOKEN}
    ours |= {"HF_ENDPOINT": address} if address else {}
    quick = {"HF_HUB_OFFLINE": "0", "HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1"}
    return os.environ | hidden | ours | quick | more


def read_all(home: Path, address: str, requests: Iterable[dict[str, Any]], **more: str) -> list[Answer]:
    """Read datasets one after the other in one process, which takes seconds to start."""
    asked = list(requests)
    done = subprocess.run(
        [sys.executable, "-c", READ],
        input=json.dumps(asked),
        env=environment(home, address, **more),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    said = done.stderr.split(BETWEEN)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(asked), done.stderr
    return [
        Answer(item["numbers"], item["rows"], item["failures"], item.get("error"), text, item["seconds"])
        for item, text in zip(found, said, strict=False)
    ]
