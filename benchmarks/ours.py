"""headprobe as a contestant: the real command, images decoded and results written."""

import csv
import json
import sys
from functools import partial
from pathlib import Path

from benchmarks.contestant import Contestant, Found
from benchmarks.peers.common import Setting, read


def headprobe(name: str, file: Path, spec: str, threads: int, *words: str, exact: bool = True) -> Contestant:
    """Return `headprobe test` under a mask spec as a contestant.

    Args:
        name: As it stands in the table.
        file: The setting.
        spec: As `--mask-spec`.
        threads: `OMP_NUM_THREADS` of each process.
        words: Further options.
        exact: Whether it computes in float32.
    """
    command = (sys.executable, "-m", "headprobe", "test", *options(read(file)), *words, "--mask-spec", spec)
    return Contestant(name, command, partial(found, setting=read(file)), threads, exact=exact, ours=True)


def options(setting: Setting) -> tuple[str, ...]:
    """Return the options that give headprobe the images and weights of a setting."""
    given = ("--model.options", json.dumps(setting.given)) if setting.given else ()
    return (
        *("--model.name", setting.named),
        *("--model.weights", setting.weights),
        *given,
        *("--data.path", setting.images),
        *("--data.class_map", "identity"),
        *("--data.num_workers", str(setting.workers)),
        *("--trainer.accelerator", "cpu"),
        *("--resume", "never"),
    )


def two_processes() -> tuple[str, ...]:
    """Return the options that share a run between two processes."""
    return ("--trainer.devices", "2", "--trainer.strategy", "ddp")


def found(folder: Path, _: str, setting: Setting) -> Found:
    """Read what a run wrote: `seconds` of run.json (from the planned passes to the last file) and masks.csv.

    Lightning fetches the first batch before that clock starts, so what decoding it takes is added.
    """
    directory = folder / "lightning_logs" / "version_0"
    record = json.loads((directory / "run.json").read_text())
    with (directory / "masks.csv").open(newline="") as file:
        counts = {row["mask"]: int(row["top1_count"]) for row in csv.DictReader(file)}
    fetched = 0 if setting.workers else min(record["batch_size"], setting.unit)
    return Found(float(record["seconds"]) + fetched * setting.decoding, counts)
